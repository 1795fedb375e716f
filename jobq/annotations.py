"""
What annotations say: what a function takes and gives, and who takes whose items.

    read_signature   a declared function      → `Signature`: its item, its other parameters, what it gives
    accepts          two annotations          → whether one stage takes what the other gives

Annotations are resolved one by one: a name that exists only under ``TYPE_CHECKING`` matters only where its
type does.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import itertools
import sys
import types
import typing
from collections import abc
from collections.abc import Iterable
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

    @property
    def job_names(self) -> list[str]:
        """The names of the parameters that are given the `Job`."""
        return [binding.name for binding in self.bindings if binding.kind == "job"]


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
    if isinstance(declared, Resource):
        problems += [
            f"its {one.name} is a Shard, which stages have" for one in bindings if one.kind == "shard"
        ]
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
        if any(is_none(member) for member in members(item_type)):
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
    meant = [plain(member) for member in members(annotation) if not is_none(member)]
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
    some = [member for member in declared_types if not is_none(member)]
    elements = [_element(member, CONTAINERS if producer else ITERATORS) for member in some]
    if not some or (EMPTY in elements and (producer or yields)):
        problems.append(_not_many(yields, annotation))
        return given | {"gives": True}
    if EMPTY not in elements:
        origins = {origin_of(plain(member)) for member in some}
        given["many"] = True
        given["is_generator"] |= bool(origins & ITERATORS)
        given["is_async"] |= any("Async" in origin.__name__ for origin in origins)
        outputs = [part for element in elements for part in members(element)]
    else:
        outputs = some
    kept = tuple(_unique(member for member in outputs if not is_none(member)))
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
            annotation = bound if bound is not None else union_of(constraints) if constraints else Any
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


def origin_of(annotation: Any) -> Any:
    """Return the class that *annotation* is made of (``list`` of ``list[int]``), or itself."""
    return typing.get_origin(annotation) or annotation


def _element(annotation: Any, kinds: frozenset[Any]) -> Any:
    """Return T of ``kind[T]``, `EMPTY` if *annotation* is no such thing."""
    base = plain(annotation)
    origin, args = origin_of(base), typing.get_args(base)
    if not isinstance(origin, type) or origin not in kinds:
        return EMPTY
    if not args:
        return Any
    if origin is tuple:
        args = tuple(arg for arg in args if arg is not ...)
        return union_of(args)
    return args[0]


def contained(annotation: Any) -> Any:
    """Return T of a list, an iterator or another container of T, `EMPTY` if *annotation* is none."""
    return _element(annotation, CONTAINERS)


def union_of(annotations: tuple[Any, ...]) -> Any:
    """Return the union of *annotations*."""
    return typing.Union[annotations]  # noqa: UP007  # there is no other spelling for a tuple of them


def is_none(annotation: Any) -> bool:
    """Whether None is (one of) what *annotation* stands for."""
    base = plain(annotation)
    return base is None or base is type(None) or None in (literals(base) or ())


def literals(annotation: Any) -> tuple[Any, ...] | None:
    """Return the values of a ``Literal``; None for anything else."""
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
    if (values := literals(given)) is not None:
        wanted = literals(taker)
        if wanted is not None:
            return all(any(v == w and type(v) is type(w) for w in wanted) for v in values)
        return all(accepts(taker, type(value)) for value in values)
    if isinstance(given, typing.NewType):
        return accepts(taker, given.__supertype__)
    if typing_extensions.is_typeddict(origin_of(given)):
        return _accepts_typed_dict(taker, origin_of(given))
    if not isinstance(origin_of(taker), type) or not isinstance(origin_of(given), type):
        return False
    return _accepts_class(origin_of(taker), origin_of(given)) and _accepts_arguments(taker, given)


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
    origin = origin_of(taker)
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
    if not wanted or origin_of(taker) is abc.Callable:
        return True
    has = arguments_as(given, origin_of(taker))
    if not has:  # a bare generic: list is list[Any]
        return True
    if origin_of(taker) is tuple and origin_of(given) is tuple:
        return _accepts_tuple(wanted, has)
    if origin_of(given) is tuple:
        return all(accepts(wanted[0], part) for part in has if part is not ...)
    return all(itertools.starmap(accepts, zip(wanted, has, strict=False)))


def _accepts_tuple(wanted: tuple[Any, ...], has: tuple[Any, ...]) -> bool:
    if wanted[-1] is ...:
        return all(accepts(wanted[0], part) for part in has if part is not ...)
    if has[-1] is ...:
        return False
    return len(wanted) == len(has) and all(itertools.starmap(accepts, zip(wanted, has, strict=True)))


def arguments_as(given: Any, base: Any) -> tuple[Any, ...]:
    """Return the arguments of *given*, or those that it gives its *base* (``class Pages(list[Page])``)."""
    origin, args = origin_of(given), typing.get_args(given)
    if args or origin is base:
        return args
    for parent in getattr(origin, "__orig_bases__", ()):
        parent_origin = origin_of(parent)
        if isinstance(parent_origin, type) and _is_subclass(parent_origin, base):
            return arguments_as(parent, base)
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
