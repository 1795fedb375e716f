"""
Values against their declared types.

    Validator        an annotation, items     → what is wrong with them; it judges, it never converts
    Router           declared types, an item  → the most specific of them that the item belongs to
    read_parameter   an annotation, a value   → the value as that type; lax, for parameters of a run
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import operator
import reprlib
import types
import typing
from collections import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import typing_extensions

from jobq.annotations import (
    CONTAINERS,
    EMPTY,
    ITERATORS,
    accepts,
    arguments_as,
    hints,
    is_none,
    literals,
    members,
    origin_of,
    plain,
    spell,
    typed_dict_fields,
    union_of,
)

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
                origin = origin_of(base)
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


#: Annotations that look at the type of a scalar, or not even at that.
_BARE = (int, float, bool, str, bytes, None, type(None), Any, object)


def decided_by_types(annotation: Any) -> bool:
    """
    Whether the keys of a dict of scalars and the types of its values say if it is of the annotated type.

    Then what is found right of one such dict is true of all that are like it.
    """
    base = plain(annotation)
    if _metadata(annotation):
        return False
    if typing_extensions.is_typeddict(base):
        return all(_is_bare(kind) for kind, _ in typed_dict_fields(base).values())
    return base is dict or (typing.get_origin(base) is dict and all(map(_is_bare, typing.get_args(base))))


def _is_bare(annotation: Any) -> bool:
    """Whether an annotation names scalars, or anything, and nothing that looks at their values."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return all(map(_is_bare, typing.get_args(annotation)))
    return any(annotation is one for one in _BARE)


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
        if type(origin_of(annotation)).__name__ == "TypeAliasType":
            return self._named(spell(annotation), lambda: self.build(plain(annotation), known))
        base = plain(annotation)
        origin, args = origin_of(base), typing.get_args(base)
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
        choices = [self.build(part, known) for part in parts if not is_none(part)]
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
    if typing.get_args(plain(wide)) and not arguments_as(base, origin_of(plain(wide))):
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
    if (values := literals(base)) is not None:
        return type(item) in set(map(type, values))
    origin = origin_of(base)
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
        return union_of(tuple(map(_modern, args)))
    if isinstance(origin, type) and args and not isinstance(args[0], list):
        return types.GenericAlias(origin, tuple(map(_modern, args)))
    return annotation
