"""
What annotations say: what a function takes and gives, who takes whose items, whether an item is of its type.

    read_signature   a declared function      → `Signature`: its item, its other parameters, what it gives
    accepts          two annotations          → whether one stage takes what the other gives
    Router           declared types, an item  → the most specific of them that the item belongs to
    Validator        an annotation, items     → what is wrong with them; it judges, it never converts
    read_parameter   an annotation, a value   → the value as that type; lax, for parameters of a run

Annotations are resolved one by one: a name that exists only under ``TYPE_CHECKING`` matters only where its
type does.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import itertools
import operator
import reprlib
import sys
import types
import typing
from collections import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import typing_extensions

from jobq.stage import Function, Job, Resource, Shard, Stage

EMPTY = inspect.Parameter.empty

#: A consumer annotated with one of these gives many items.
ITERATORS = frozenset(
    {abc.Iterator, abc.Iterable, abc.Generator, abc.AsyncIterator, abc.AsyncIterable, abc.AsyncGenerator}
)
#: So does a producer, with one of these as well.
CONTAINERS = ITERATORS | {
    list, tuple, set, frozenset, collections.deque,
    abc.Sequence, abc.MutableSequence, abc.Set, abc.MutableSet, abc.Collection,
}  # fmt: skip
#: What the parameter of a stage with ``batch`` may be annotated with: it gets a list.
BATCHES = frozenset({list, abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable})
#: Annotations that mean a stage without output.
NOTHING = (EMPTY, type(None), typing.NoReturn, typing.Never)
QUALIFIERS = (typing.Required, typing.NotRequired, typing_extensions.ReadOnly, typing.Final, typing.ClassVar)


# ── reading a signature ──────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Binding:
    """A parameter other than the item; it can always be passed by keyword."""

    name: str
    kind: Literal["job", "shard", "free"]
    annotation: Any = EMPTY
    default: Any = EMPTY


@dataclass(frozen=True, slots=True)
class Signature:
    """
    What a function takes and gives.

    ``item`` is the name of the item's parameter; ``item_first`` says that it may be passed by position,
    ``item_known`` that its type could be read.
    ``outputs`` are the declared types, a union as its members; ``nullable``: None is among them.
    ``is_async``: calling it needs an event loop. ``problems`` lists what makes it unfit for its place.
    """

    item: str | None = None
    item_type: Any = Any
    item_first: bool = True
    item_known: bool = False
    batched: bool = False
    bindings: tuple[Binding, ...] = ()
    many: bool = False
    outputs: tuple[Any, ...] = ()
    nullable: bool = False
    gives: bool = False
    is_async: bool = False
    is_generator: bool = False
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unresolved:
    """Stands for an annotation that can't be read."""

    text: str
    reason: str


def read_signature(declared: Stage | Resource) -> Signature:
    """Return what *declared* takes and gives; what is wrong with it is in ``problems``."""
    try:
        signature = inspect.signature(declared.function)
    except (TypeError, ValueError) as error:
        return Signature(problems=(f"its parameters can't be read: {error}; wrap it in a function",))
    resolve = _Names.of(declared.function).resolve
    problems: list[str] = []
    parameters = [
        parameter.replace(annotation=resolve(parameter.annotation))
        for parameter in signature.parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    taken: dict[str, Any] = {}
    if isinstance(declared, Stage) and declared.kind == "consumer":
        taken = _read_item(declared, parameters, problems)
    bindings = _read_bindings([p for p in parameters if p.name != taken.get("item")], problems)
    given = _read_return(declared, resolve(signature.return_annotation), problems)
    return Signature(**taken, **given, bindings=bindings, problems=tuple(problems))


def _read_item(stage: Stage, parameters: list[inspect.Parameter], problems: list[str]) -> dict[str, Any]:
    item = next((p for p in parameters if _kind(p.annotation) != "job"), None)
    if item is None:
        problems.append("it takes no item: give it a parameter annotated with the type that it takes")
        return {}
    annotation, batch = item.annotation, stage.consumer.batch
    taken = {
        "item": item.name,
        "item_first": item is parameters[0] and item.kind is not item.KEYWORD_ONLY,
        "batched": batch is not None,
        "item_type": Any,
    }
    if item.kind is item.POSITIONAL_ONLY and not taken["item_first"]:
        problems.append(f"its parameter {item.name} is positional-only but not the first: remove the '/'")
    if annotation is EMPTY:
        problems.append(f"its parameter {item.name}, the item, has no annotation: say which type it takes")
    elif isinstance(annotation, Unresolved):
        problems.append(_unresolved(annotation, f"of its parameter {item.name}, the item,"))
    elif batch is not None and (element := _element(annotation, BATCHES)) is EMPTY:
        problems.append(
            f"batch={batch}, but its parameter {item.name} is annotated {spell(annotation)}: "
            f"annotate it list[{spell(annotation)}], or remove batch="
        )
    else:
        item_type = element if batch is not None else annotation
        taken |= {"item_type": item_type, "item_known": True}
        if any(_is_none(member) for member in members(item_type)):
            problems.append(
                f"its parameter {item.name} accepts None ({spell(annotation)}), which no stage ever gives: "
                f"remove None from the annotation"
            )
    return taken


def _read_bindings(parameters: list[inspect.Parameter], problems: list[str]) -> tuple[Binding, ...]:
    bindings = []
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            if parameter.default is EMPTY:
                problems.append(
                    f"its parameter {parameter.name} is positional-only, so it can't be given: remove the '/'"
                )
            continue
        annotation = EMPTY if isinstance(parameter.annotation, Unresolved) else parameter.annotation
        bindings.append(Binding(parameter.name, _kind(parameter.annotation), annotation, parameter.default))
    return tuple(bindings)


def _kind(annotation: Any) -> Literal["job", "shard", "free"]:
    if isinstance(annotation, Unresolved):
        # Often imported under TYPE_CHECKING, as linters advise.
        known = {"Job": "job", "jobq.Job": "job", "Shard": "shard", "jobq.Shard": "shard"}
        return typing.cast('Literal["job", "shard", "free"]', known.get(annotation.text.strip("'"), "free"))
    meant = [plain(member) for member in members(annotation) if not _is_none(member)]
    return "job" if meant == [Job] else "shard" if meant == [Shard] else "free"


def _read_return(declared: Stage | Resource, annotation: Any, problems: list[str]) -> dict[str, Any]:
    function = _called(declared.function)
    yields = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
    given: dict[str, Any] = {
        "is_async": inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function),
        "is_generator": yields,
    }
    if isinstance(declared, Resource):
        return given
    if isinstance(declared.function, type):
        annotation = declared.function
    producer = declared.kind == "producer"
    if isinstance(annotation, Unresolved):
        problems.append(_unresolved(annotation, "of what it gives"))
        return given | {"gives": True}
    if not producer and not yields and annotation in NOTHING:
        return given
    declared_types = () if annotation in NOTHING else members(annotation)
    some = [member for member in declared_types if not _is_none(member)]
    elements = [_element(member, CONTAINERS if producer else ITERATORS) for member in some]
    if not some or (EMPTY in elements and (producer or yields)):
        problems.append(_not_many(yields, annotation))
        return given | {"gives": True}
    if EMPTY not in elements:
        origins = {_origin(plain(member)) for member in some}
        given["many"] = True
        given["is_generator"] |= bool(origins & ITERATORS)
        given["is_async"] |= any("Async" in origin.__name__ for origin in origins)
        outputs = [part for element in elements for part in members(element)]
    else:
        outputs = some
    kept = tuple(_unique(member for member in outputs if not _is_none(member)))
    return given | {
        "outputs": kept,
        "nullable": len(some) < len(declared_types) or len(kept) < len(outputs),
        "gives": bool(kept),
    }


def _not_many(yields: bool, annotation: Any) -> str:
    how = "yields" if yields else "is a producer"
    has = "has no return annotation" if annotation is EMPTY else f"is annotated -> {spell(annotation)}"
    shape = "Iterator" if yields else "Iterable"
    if annotation in NOTHING:
        return f"it {how} but {has}: annotate it -> {shape}[T], T being the type of its items"
    return f"it {how} but {has}: annotate it -> {shape}[{spell(annotation)}]"


def _unresolved(annotation: Unresolved, where: str) -> str:
    return (
        f"the annotation {annotation.text!r} {where} can't be read ({annotation.reason}): "
        f"its type matters here, so import it outside `if TYPE_CHECKING:`"
    )


def _called(function: Function) -> Function:
    """Return the plain function that runs when *function* is called."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__


def _body(function: Any) -> Any:
    """Return the function in which the annotations of *function* were written."""
    while not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        if hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, types.MethodType):
            function = function.__func__
        elif inspect.isroutine(function) or not callable(function):
            return None
        else:
            function = (
                vars(function).get("__init__") if isinstance(function, type) else type(function).__call__
            )
    return function


@dataclass(frozen=True, slots=True)
class _Names:
    """The names that a function's annotations may use."""

    module: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, function: Function) -> _Names:
        body = _body(function)
        if body is None:
            return cls()
        local = _defining_call(body)
        for name, cell in zip(body.__code__.co_freevars, body.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not filled yet
                local[name] = cell.cell_contents
        local |= {p.__name__: p for p in getattr(body, "__type_params__", ())}
        return cls(body.__globals__, local)

    def resolve(self, annotation: Any) -> Any:
        """Return what *annotation* stands for, `Unresolved` if that can't be told."""
        if annotation is EMPTY:
            return EMPTY
        holder = types.SimpleNamespace(__annotations__={"it": annotation})
        try:
            return typing.get_type_hints(holder, self.module, self.local, include_extras=True)["it"]
        except Exception as error:  # evaluating an annotation runs user code
            text = annotation if isinstance(annotation, str) else spell(annotation)
            return Unresolved(text, str(error) or type(error).__name__)


def _defining_call(function: types.FunctionType) -> dict[str, Any]:
    """Return the local names of the call that defined *function*, if it is still running."""
    outer, found, _ = function.__qualname__.rpartition(".<locals>.")
    frame: types.FrameType | None = sys._getframe() if found else None
    while frame is not None:
        code = frame.f_code
        if code.co_qualname == outer and code.co_filename == function.__code__.co_filename:
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


# ── taking annotations apart ─────────────────────────────────────────────────


def plain(annotation: Any) -> Any:
    """Return *annotation* without ``Annotated``, qualifiers, aliases and type variables."""
    while True:
        origin = typing.get_origin(annotation)
        if annotation is EMPTY:
            return Any
        if origin is typing.Annotated or origin in QUALIFIERS:
            annotation = typing.get_args(annotation)[0]
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = _value_of(annotation)
        elif type(origin).__name__ == "TypeAliasType":
            annotation = _value_of(origin)[typing.get_args(annotation)]
        elif isinstance(annotation, typing.TypeVar):
            bound, constraints = annotation.__bound__, annotation.__constraints__
            annotation = bound if bound is not None else _union_of(constraints) if constraints else Any
        else:
            return str if annotation is typing.LiteralString else annotation


def _value_of(alias: Any) -> Any:
    """Return what *alias* stands for; before Python 3.12 a recursive one is written with strings."""
    module = getattr(sys.modules.get(alias.__module__), "__dict__", {})
    holder = types.SimpleNamespace(__annotations__={"it": alias.__value__})
    try:
        return typing.get_type_hints(holder, module, {alias.__name__: alias}, include_extras=True)["it"]
    except Exception:  # evaluating an annotation runs user code
        return Any


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, nested ones and aliases included; of anything else, itself."""
    base = plain(annotation)
    if typing.get_origin(base) in (typing.Union, types.UnionType):
        return tuple(_unique(part for member in typing.get_args(base) for part in members(member)))
    return (annotation,)


def spell(annotation: Any) -> str:
    """Return *annotation* as messages write it: ``Page``, ``list[Page]``, ``Invoice | Receipt``."""
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is ...:
        return "..."
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(spell, args))
    if origin is typing.Annotated:
        return spell(args[0])
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, args))}]"
    if origin is not None and args:
        return f"{spell(origin)}[{', '.join(map(spell, args))}]"
    if isinstance(annotation, list):
        return f"[{', '.join(map(spell, annotation))}]"
    if isinstance(annotation, str):
        return annotation
    name = getattr(annotation, "__name__", None)
    return name if isinstance(name, str) else repr(annotation).removeprefix("typing.")


def _origin(annotation: Any) -> Any:
    return typing.get_origin(annotation) or annotation


def _element(annotation: Any, kinds: frozenset[Any]) -> Any:
    """Return T of ``kind[T]``, `EMPTY` if *annotation* is no such thing."""
    base = plain(annotation)
    origin, args = _origin(base), typing.get_args(base)
    if not isinstance(origin, type) or origin not in kinds:
        return EMPTY
    if not args:
        return Any
    if origin is tuple:
        args = tuple(arg for arg in args if arg is not ...)
        return _union_of(args)
    return args[0]


def _union_of(annotations: tuple[Any, ...]) -> Any:
    return typing.Union[annotations]  # noqa: UP007  # there is no other spelling for a tuple of them


def _is_none(annotation: Any) -> bool:
    base = plain(annotation)
    return base is None or base is type(None) or None in (_literals(base) or ())


def _literals(annotation: Any) -> tuple[Any, ...] | None:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else None


def _unique(annotations: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for annotation in annotations:
        if annotation not in found:
            found.append(annotation)
    return found


# ── which type takes which ───────────────────────────────────────────────────


def accepts(taker: Any, given: Any) -> bool:
    """Whether a stage that takes *taker* takes items declared as *given*."""
    if taker == given:
        return True
    taker, given = plain(taker), plain(given)
    if taker is Any or taker is object or given is Any:
        return True
    given_members, taker_members = members(given), members(taker)
    if len(given_members) > 1:
        return all(accepts(taker, member) for member in given_members)
    if len(taker_members) > 1:
        return any(accepts(member, given) for member in taker_members)
    taker, given = (type(None) if side is None else side for side in (taker, given))
    if taker == given:
        return True
    return _accepts_one(taker, given)


def _accepts_one(taker: Any, given: Any) -> bool:
    if (values := _literals(given)) is not None:
        wanted = _literals(taker)
        if wanted is not None:
            return all(any(v == w and type(v) is type(w) for w in wanted) for v in values)
        return all(accepts(taker, type(value)) for value in values)
    if isinstance(given, typing.NewType):
        return accepts(taker, given.__supertype__)
    if typing_extensions.is_typeddict(_origin(given)):
        return _accepts_typed_dict(taker, _origin(given))
    if not isinstance(_origin(taker), type) or not isinstance(_origin(given), type):
        return False
    return _accepts_class(_origin(taker), _origin(given)) and _accepts_arguments(taker, given)


def _accepts_class(taker: type, given: type) -> bool:
    if typing_extensions.is_typeddict(taker):
        return False
    if given is bool or taker is bool:
        # As pydantic's strict mode has it: True is no number.
        return taker is given or (not issubclass(int, taker) and _is_subclass(given, taker))
    if taker is float or taker is complex:
        return issubclass(given, (int, float, taker))
    return _is_subclass(given, taker) or (typing_extensions.is_protocol(taker) and _has_members(given, taker))


def _is_subclass(given: type, taker: type) -> bool:
    try:
        return issubclass(given, taker)
    except TypeError:  # a protocol that can't be asked at run time
        return taker in given.__mro__


def _has_members(given: type, protocol: type) -> bool:
    """Whether *given* has, declares or sets in ``__init__`` everything that *protocol* names."""
    declared = {name for base in given.__mro__ for name in getattr(base, "__annotations__", ())}
    code = getattr(inspect.getattr_static(given, "__init__"), "__code__", None)
    declared.update(code.co_names if code is not None else ())
    return all(
        hasattr(given, name) or name in declared for name in typing_extensions.get_protocol_members(protocol)
    )


def _accepts_typed_dict(taker: Any, given: type) -> bool:
    origin = _origin(taker)
    fields = typed_dict_fields(given)
    if typing_extensions.is_typeddict(origin):
        return origin is given or all(
            (name in fields and accepts(field, fields[name][0])) if required else
            (name not in fields or accepts(field, fields[name][0]))
            for name, (field, required) in typed_dict_fields(origin).items()
        )  # fmt: skip
    if not isinstance(origin, type) or not _is_subclass(dict, origin):
        return (
            isinstance(origin, type) and typing_extensions.is_protocol(origin) and _has_members(dict, origin)
        )
    args = typing.get_args(taker)
    return len(args) < 2 or (
        accepts(args[0], str) and all(accepts(args[1], kind) for kind, _ in fields.values())
    )


def _accepts_arguments(taker: Any, given: Any) -> bool:
    wanted = typing.get_args(taker)
    if not wanted or _origin(taker) is abc.Callable:
        return True
    has = _arguments_as(given, _origin(taker))
    if not has:  # a bare generic: list is list[Any]
        return True
    if _origin(taker) is tuple and _origin(given) is tuple:
        return _accepts_tuple(wanted, has)
    if _origin(given) is tuple:
        return all(accepts(wanted[0], part) for part in has if part is not ...)
    return all(itertools.starmap(accepts, zip(wanted, has, strict=False)))


def _accepts_tuple(wanted: tuple[Any, ...], has: tuple[Any, ...]) -> bool:
    if wanted[-1] is ...:
        return all(accepts(wanted[0], part) for part in has if part is not ...)
    if has[-1] is ...:
        return False
    return len(wanted) == len(has) and all(itertools.starmap(accepts, zip(wanted, has, strict=True)))


def _arguments_as(given: Any, base: Any) -> tuple[Any, ...]:
    """Return the arguments of *given*, or those that it gives its *base* (``class Pages(list[Page])``)."""
    origin, args = _origin(given), typing.get_args(given)
    if args or origin is base:
        return args
    for parent in getattr(origin, "__orig_bases__", ()):
        parent_origin = _origin(parent)
        if isinstance(parent_origin, type) and _is_subclass(parent_origin, base):
            return _arguments_as(parent, base)
    return ()


def hints(owner: type) -> dict[str, Any]:
    """Return a class's annotations, each resolved by itself; one that can't be is ``Any``."""
    found: dict[str, Any] = {}
    for base in reversed(owner.__mro__):
        module = getattr(sys.modules.get(base.__module__), "__dict__", {})
        local = {
            **vars(base),
            **{p.__name__: p for p in getattr(base, "__type_params__", ())},
            base.__name__: base,
        }
        for name, annotation in inspect.get_annotations(base).items():
            holder = types.SimpleNamespace(__annotations__={"it": annotation})
            try:
                found[name] = typing.get_type_hints(holder, module, local, include_extras=True)["it"]
            except Exception:  # evaluating an annotation runs user code
                found[name] = Any
    return found


def typed_dict_fields(owner: type) -> dict[str, tuple[Any, bool]]:
    """Return the fields of a TypedDict: their types, and whether each is required."""
    optional: frozenset[str] = getattr(owner, "__optional_keys__", frozenset())
    fields = {}
    for name, annotation in hints(owner).items():
        required, kind = name not in optional, annotation
        # String annotations hide the qualifiers from TypedDict itself.
        while (origin := typing.get_origin(kind)) in QUALIFIERS:
            required = origin is not typing.NotRequired and (required or origin is typing.Required)
            kind = typing.get_args(kind)[0]
        fields[name] = (kind, required)
    return fields


# ── whether an item is of its type ───────────────────────────────────────────


class Validator:
    """
    Judges items by an annotation, strictly, and changes none.

    Where an item's class decides, only classes are looked at; else the whole list is one call of
    pydantic-core. Instances of pydantic models are trusted.
    """

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation
        self._good: set[type] = set()
        base = plain(annotation)
        self._class: type | None = None
        self._schema: Any = None
        if base is Any or base is object:
            return
        bare = annotation is base or not _metadata(annotation)
        if bare and (isinstance(base, type) and by_class(base)):
            self._class = base
        else:
            from pydantic_core import CoreConfig, SchemaValidator, core_schema

            try:
                items = core_schema.list_schema(Schemas().build(annotation, {}), strict=False)
                self._schema = SchemaValidator(items, CoreConfig(strict=True))
            except Exception:  # an annotation may refuse in any way to be made a schema
                origin = _origin(base)
                self._class = origin if isinstance(origin, type) and origin is not typing.Generic else None

    def check(self, items: list[Any]) -> dict[int, str]:
        """Return what is wrong with the items that don't fit, by index."""
        if self._schema is not None:
            return self._check_all(items)
        if self._class is None or self._good.issuperset(map(type, items)):
            return {}
        return self._check_classes(items)

    def fits(self, item: Any) -> bool:
        """Whether *item* is of the annotated type."""
        return not self.check([item])

    def _check_classes(self, items: list[Any]) -> dict[int, str]:
        assert self._class is not None
        problems = {}
        for index, item in enumerate(items):
            kind = type(item)
            if kind in self._good:
                continue
            if not _is_instance(item, self._class):
                problems[index] = f"Input should be an instance of {spell(self._class)}; got {_show(item)}"
            elif not typing_extensions.is_protocol(self._class):
                self._good.add(kind)
        return problems

    def _check_all(self, items: list[Any]) -> dict[int, str]:
        from pydantic_core import ValidationError

        try:
            self._schema.validate_python(items)
        except ValidationError as error:
            found: dict[int, list[str]] = {}
            for problem in error.errors(include_url=False, include_context=False):
                index, *path = problem["loc"]
                found.setdefault(int(index), []).append(_explain(path, problem))
            return {index: _join(texts) for index, texts in found.items()}
        except BaseException as error:  # a validator of the user's: whose item was it?
            if len(items) == 1:
                return {0: f"validating it raised {type(error).__name__}: {error}; got {_show(items[0])}"}
            return {i: text for i, item in enumerate(items) for text in self._check_all([item]).values()}
        return {}


def _explain(path: Sequence[Any], problem: Mapping[str, Any]) -> str:
    where = f"field '{'.'.join(map(str, path))}': " if path else ""
    got = "" if problem["type"] == "missing" else f"; got {_show(problem['input'])}"
    return f"{where}{problem['msg']}{got}"


def _join(texts: Sequence[str], limit: int = 3) -> str:
    more = f"; and {len(texts) - limit} more" if len(texts) > limit else ""
    return "; ".join(texts[:limit]) + more


def _show(value: Any) -> str:
    try:
        text = reprlib.repr(value)
    except Exception:  # a repr of the user's
        text = "that can't be shown"
    return "None" if value is None else f"{type(value).__name__} {text}"


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return (
        getattr(annotation, "__metadata__", ()) if typing.get_origin(annotation) is typing.Annotated else ()
    )


def _is_instance(item: Any, kind: type) -> bool:
    """``isinstance`` as strict validation has it: int passes for float, bool is no number."""
    if kind in (int, float, complex):
        return not isinstance(item, bool) and (
            isinstance(item, kind) or (kind is not int and isinstance(item, int))
        )
    if typing_extensions.is_protocol(kind) and not getattr(kind, "_is_runtime_protocol", False):
        return True
    return isinstance(item, kind)


def by_class(kind: type) -> bool:
    """Whether an item's class alone says that it is a *kind*; else its fields have to be looked at."""
    from pydantic import BaseModel

    if issubclass(kind, BaseModel):
        return True
    return not (
        dataclasses.is_dataclass(kind)
        or typing_extensions.is_typeddict(kind)
        or typing.get_origin(kind) is not None
        or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
        or hasattr(kind, "__get_pydantic_core_schema__")
    )


class Schemas:
    """
    Makes core schemas of annotations, strict ones that only judge.

    pydantic's own would run ``__post_init__`` of dataclasses, descend into models and refuse
    ``typing.TypedDict`` on 3.11; leaves that only pydantic knows are still its own.
    """

    def __init__(self) -> None:
        self._open: dict[str, bool] = {}

    def build(self, annotation: Any, known: Mapping[Any, Any]) -> Any:
        """Return the schema of *annotation*; *known* are the values of type variables."""
        from pydantic_core import core_schema as core

        if isinstance(annotation, typing.TypeVar) and annotation in known:
            return self.build(known[annotation], {})
        if metadata := _metadata(annotation):
            return self._annotated(typing.get_args(annotation)[0], metadata, known)
        if type(_origin(annotation)).__name__ == "TypeAliasType":
            return self._named(spell(annotation), lambda: self.build(plain(annotation), known))
        base = plain(annotation)
        origin, args = _origin(base), typing.get_args(base)
        if base is Any or base is object:
            return core.any_schema()
        if base is None or base is type(None):
            return core.none_schema()
        if origin is Literal:
            return core.literal_schema(list(args))
        if origin in (typing.Union, types.UnionType):
            return self._union(base, known)
        if isinstance(base, typing.NewType):
            return self.build(base.__supertype__, known)
        if not isinstance(origin, type):
            return core.any_schema()
        if (not by_class(origin) and not args) or dataclasses.is_dataclass(origin) or _is_record(origin):
            return self._fields(base, origin, args, known)
        return self._generic(origin, args, known) if args else _class_schema(origin)

    def _annotated(self, inner: Any, metadata: tuple[Any, ...], known: Mapping[Any, Any]) -> Any:
        from pydantic import TypeAdapter

        class Built:
            schema = self.build(inner, known)

            @classmethod
            def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:  # pydantic's hook
                return cls.schema

        annotated: Any = typing.Annotated  # Any: mypy wants to read what is in the brackets
        return TypeAdapter(annotated[(Any, Built, *metadata)]).core_schema

    def _union(self, union: Any, known: Mapping[Any, Any]) -> Any:
        from pydantic_core import core_schema as core

        parts = members(union)
        choices = [self.build(part, known) for part in parts if not _is_none(part)]
        if len(choices) == 1:
            chosen = choices[0]
        else:
            # One text for the field: pydantic's own would name each member as if it were a field.
            text = f"Input should be {' or '.join(spell(part) for part in parts)}"
            chosen = core.union_schema(
                choices, mode="left_to_right", custom_error_type="union", custom_error_message=text
            )
        return core.nullable_schema(chosen) if len(choices) < len(parts) else chosen

    def _named(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what *make* makes, with references where it meets itself again."""
        from pydantic_core import core_schema as core

        if name in self._open:
            self._open[name] = True
            return core.definition_reference_schema(name)
        self._open[name] = False
        try:
            schema = make()
        finally:
            recursive = self._open.pop(name)
        if not recursive:
            return schema
        return core.definitions_schema(core.definition_reference_schema(name), [schema | {"ref": name}])

    def _fields(self, base: Any, origin: type, args: tuple[Any, ...], known: Mapping[Any, Any]) -> Any:
        if not (dataclasses.is_dataclass(origin) or _is_record(origin)):
            return _leaf(base)
        variables = getattr(origin, "__parameters__", ())
        values = [known.get(arg, arg) if isinstance(arg, typing.TypeVar) else arg for arg in args]
        inner = dict(zip(variables, values, strict=False))
        make = self._typed_dict if typing_extensions.is_typeddict(origin) else self._object
        return self._named(f"{origin.__module__}.{spell(base)}:{id(origin)}", lambda: make(origin, inner))

    def _typed_dict(self, origin: type, known: Mapping[Any, Any]) -> Any:
        from pydantic_core import CoreConfig
        from pydantic_core import core_schema as core

        return core.typed_dict_schema(
            {
                name: core.typed_dict_field(self.build(kind, known), required=required)
                for name, (kind, required) in typed_dict_fields(origin).items()
            },
            config=CoreConfig(strict=True),
        )

    def _object(self, origin: type, known: Mapping[Any, Any]) -> Any:
        """Return the schema of an object with declared attributes: a dataclass, a named tuple."""
        from pydantic_core import CoreConfig
        from pydantic_core import core_schema as core

        annotations = hints(origin)
        if dataclasses.is_dataclass(origin):
            fields = {field.name: field.init for field in dataclasses.fields(origin)}
        else:
            fields = dict.fromkeys(origin._fields, True)  # type: ignore[attr-defined]  # a named tuple
        schemas = {name: self.build(annotations.get(name, Any), known) for name in fields}
        if any(hasattr(inspect.getattr_static(origin, name, None), "__set__") for name in fields) or (
            issubclass(origin, tuple)
        ):
            judged: Any = core.model_fields_schema(
                {
                    name: core.model_field(
                        schema if fields[name] else core.with_default_schema(schema, default=None)
                    )
                    for name, schema in schemas.items()
                },
                from_attributes=True,
            )
        else:
            # Twice as fast as reading attributes.
            judged = core.no_info_before_validator_function(
                operator.attrgetter("__dict__"),
                core.typed_dict_schema(
                    {
                        name: core.typed_dict_field(schema, required=fields[name])
                        for name, schema in schemas.items()
                    },
                    config=CoreConfig(strict=True),
                ),
            )
        return core.chain_schema([core.is_instance_schema(origin), judged])

    def _generic(self, origin: type, args: tuple[Any, ...], known: Mapping[Any, Any]) -> Any:
        from pydantic_core import core_schema as core

        if origin is type:
            return core.is_instance_schema(type)
        kind = core.is_instance_schema(origin)
        if origin is tuple:
            return self._tuple(args, known)
        if issubclass(origin, collections.Counter):
            args = (args[0], int)
        if issubclass(origin, abc.Mapping) and len(args) == 2:
            key, value = (self.build(arg, known) for arg in args)
            return core.chain_schema([kind, core.dict_schema(key, value, strict=False)])
        if len(args) == 1 and (issubclass(origin, abc.Collection) or origin in CONTAINERS - ITERATORS):
            # Lax as to what kind of collection: the class was looked at just before.
            elements = core.list_schema(self.build(args[0], known), strict=origin is list)
            return elements if origin is list else core.chain_schema([kind, elements])
        return kind

    def _tuple(self, args: tuple[Any, ...], known: Mapping[Any, Any]) -> Any:
        from pydantic_core import core_schema as core

        variadic = 0 if args[-1] is ... else None
        return core.tuple_schema(
            [self.build(arg, known) for arg in args if arg is not ...],
            variadic_item_index=variadic,
            strict=True,
        )


def _is_record(origin: type) -> bool:
    return typing_extensions.is_typeddict(origin) or (
        issubclass(origin, tuple) and hasattr(origin, "_fields")
    )


def _class_schema(kind: type) -> Any:
    from pydantic_core import core_schema as core

    scalars: dict[type, Callable[..., Any]] = {
        int: core.int_schema, float: core.float_schema, str: core.str_schema,
        bool: core.bool_schema, bytes: core.bytes_schema,
    }  # fmt: skip
    if kind in scalars:
        return scalars[kind](strict=True)
    if kind is complex:
        return core.complex_schema(strict=True)
    if typing_extensions.is_protocol(kind) and not getattr(kind, "_is_runtime_protocol", False):
        return core.any_schema()
    return core.is_instance_schema(kind)


def _leaf(annotation: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(annotation).core_schema


# ── which declared type an item belongs to ───────────────────────────────────


class Router:
    """Finds, among the declared types of a stage's outputs, the most specific one that an item belongs to."""

    def __init__(self, declared: Sequence[Any]) -> None:
        self._single = len(declared) == 1
        self._known: dict[type, int] = {}
        self._order = [
            (index, member, None if _decided_by_class(member) else Validator(member))
            for index, member in _narrowest_first(declared)
        ]

    def member(self, item: Any) -> int:
        """Return the index of the declared type that *item* belongs to, -1 if there is none."""
        if self._single:
            return 0
        index = self._known.get(type(item))
        return self._find(item) if index is None else index

    def _find(self, item: Any) -> int:
        found, decided = -1, True
        for index, member, validator in self._order:
            if validator is None:
                belongs = _belongs(item, plain(member))
            elif not _may_belong(item, plain(member)):
                continue
            else:
                decided = False
                belongs = validator.fits(item)
            if belongs:
                found = index
                break
        if decided:
            self._known[type(item)] = found
        return found


def _narrowest_first(declared: Sequence[Any]) -> list[tuple[int, Any]]:
    rest = list(enumerate(declared))
    ordered = []
    while rest:
        first = next(
            (one for one in rest if not any(_narrower(other, one[1]) for _, other in rest)),
            rest[0],
        )
        ordered.append(first)
        rest.remove(first)
    return ordered


def _narrower(narrow: Any, wide: Any) -> bool:
    return _covers(wide, narrow) and not _covers(narrow, wide)


def _covers(wide: Any, narrow: Any) -> bool:
    base = plain(narrow)
    if base is Any:
        return plain(wide) is Any
    if _metadata(wide) and not _metadata(narrow):
        return False
    if typing.get_args(plain(wide)) and not _arguments_as(base, _origin(plain(wide))):
        return False  # a bare list, which is a list of anything
    return accepts(wide, narrow) or (base is bool and plain(wide) is int)


def _decided_by_class(member: Any) -> bool:
    base = plain(member)
    if base is Any or base is object:
        return True
    if _metadata(member) or not isinstance(base, type) or typing_extensions.is_protocol(base):
        return False
    return by_class(base) or dataclasses.is_dataclass(base) or issubclass(base, tuple)


def _belongs(item: Any, kind: Any) -> bool:
    return kind is Any or _is_instance(item, kind) or (kind is int and isinstance(item, bool))


def _may_belong(item: Any, base: Any) -> bool:
    """Whether the class of *item* leaves it possible that it is a *base*."""
    if isinstance(base, typing.NewType):
        return _may_belong(item, plain(base.__supertype__))
    if (values := _literals(base)) is not None:
        return type(item) in set(map(type, values))
    origin = _origin(base)
    if typing_extensions.is_typeddict(origin):
        return isinstance(item, dict)
    if not isinstance(origin, type) or typing_extensions.is_protocol(origin):
        return True
    return _is_instance(item, origin) or hasattr(origin, "__get_pydantic_core_schema__")


# ── parameters of a run ──────────────────────────────────────────────────────


def read_parameter(annotation: Any, value: Any, text: bool) -> Any:
    """
    Return *value* as the annotated type; with *text* it is a string from the command line.

    Lax: "3" is an int. A text that isn't the type by itself is read as JSON. Raises `ValueError` that says
    what was expected.
    """
    if annotation is EMPTY or plain(annotation) is Any:
        return value
    adapter = _adapter(annotation)
    try:
        return _told(adapter.validate_python, value)
    except ValueError as error:
        if not text:
            raise
        problem = error
    try:
        return _told(adapter.validate_json, value)
    except ValueError as error:
        raise (error if value.lstrip()[:1] in ("{", "[", '"') else problem) from None


def json_reader(annotation: Any) -> Callable[[str | bytes], Any]:
    """Return a function that reads JSON text as the annotated type, or raises a telling `ValueError`."""
    return functools.partial(_told, _adapter(annotation).validate_json)


def _told(validate: Callable[[Any], Any], value: Any) -> Any:
    from pydantic import ValidationError

    try:
        return validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        raise ValueError(_join([_explain(problem["loc"], problem) for problem in problems])) from None
    except Exception as error:  # a validator of the user's
        raise ValueError(f"validating it raised {type(error).__name__}: {error}") from error


def _adapter(annotation: Any) -> Any:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter

    annotation = Any if annotation is EMPTY else _modern(annotation)
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # models and their like have a config of their own
        pass
    try:
        return TypeAdapter(annotation)
    except PydanticUserError as error:
        raise ValueError(f"pydantic can't read it: {error.message}") from None


def _modern(annotation: Any) -> Any:
    """Return *annotation* with each ``typing.TypedDict``, which pydantic refuses on 3.11, made anew."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if typing_extensions.is_typeddict(annotation) and type(annotation).__module__ == "typing":
        fields = {
            name: _modern(kind) if required else typing.NotRequired[_modern(kind)]
            for name, (kind, required) in typed_dict_fields(annotation).items()
        }
        make: Any = typing_extensions.TypedDict  # Any: mypy wants to read its fields
        return make(annotation.__name__, fields)
    if origin in (typing.Union, types.UnionType):
        return _union_of(tuple(map(_modern, args)))
    if isinstance(origin, type) and args and not isinstance(args[0], list):
        return types.GenericAlias(origin, tuple(map(_modern, args)))
    return annotation
