"""
Instances of plain classes, and dicts, as the tuples of their values: a third of the work of pickling them.

    Shape.encoder  an instance of one dataclass or pydantic model → its values: a row, or their pickle
    Keys.encoder   a dict → its keys and values: a row, or its pickle
    maker          what the other side needs → the function that makes an item of its values again
    restore        the same for one item by itself, where a pickle must explain itself

A pickle of an object alone repeats its class and the names of its fields, and looks the class up again when
it is loaded. Items of one route have one declared class, so it is said once for a block. Whatever is not
exactly an instance of this class with exactly its fields is pickled as ever, in a list of one.

Where all values are scalars, nothing can change the tuple of them: it is a *row*, a snapshot that need not be
pickled at once. Rows are pickled many at a time when they leave: that takes half as long, and to load them
less than a third.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import inspect
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobq.arena import Slot

PROTOCOL = 5
#: Exactly these may be gathered and pickled as one list: nothing can change them after their yield.
SCALARS = frozenset({int, float, bool, str, bytes, type(None)})
#: Whether all of some types are scalars: the answer takes no call of ours.
all_scalars = SCALARS.issuperset
#: Dicts of so many kinds are known at once; then they are learned anew.
MOST_HEADS = 256
#: What is made for dicts of one kind is made when so many have come: it takes as long as to look at them.
OFTEN = 200
#: Nor is it made for longer ones.
MOST_NAMES = 64
#: The opcode by which a pickle names a class. The same byte may stand for something else, too.
STACK_GLOBAL = b"\x93"

#: What a class defines to be pickled in a way of its own.
PICKLING = (
    "__reduce__",
    "__reduce_ex__",
    "__getstate__",
    "__setstate__",
    "__getnewargs__",
    "__getnewargs_ex__",
)

#: The values of an item, none of which can change; of a dict, its `Head` and its values.
Row = tuple[Any, ...]
Dumps = Callable[[Any], bytes | Slot]
Encoder = Callable[[Any], bytes | Slot | Row]
Builder = Callable[[Any], Any]


@dataclass(frozen=True)
class Shape:
    """A class whose instances are their fields' values, and nothing else. ``ref`` is what `builder` takes."""

    cls: type
    names: tuple[str, ...]
    ref: bytes
    is_model: bool

    def encoder(self, dumps: Dumps) -> Encoder:
        """Return the function that makes of an item, as it is now, a row, or a pickle by *dumps*."""
        return _model_encoder(self, dumps) if self.is_model else _encoder(self, dumps)

    def hides_itself(self, piece: bytes | Slot) -> bool:
        """
        Whether a value in *piece* may be the instance itself, or hold it.

        It would arrive as a second instance. Where it is pickled, its class is, and that by its name.
        """
        return STACK_GLOBAL in piece and self.cls.__qualname__.encode() in piece


def _encoder(shape: Shape, dumps: Dumps) -> Encoder:
    cls, names = shape.cls, shape.names

    def encode(item: Any) -> bytes | Slot | Row:
        if type(item) is cls:
            state = item.__dict__
            if tuple(state) == names:
                values = tuple(state.values())
                if all_scalars(map(type, values)):
                    return values
                piece = dumps(values)
                if STACK_GLOBAL not in piece or not shape.hides_itself(piece):
                    return piece
        return dumps([item])

    return encode


def _model_encoder(shape: Shape, dumps: Dumps) -> Encoder:
    cls: Any = shape.cls
    names, every = shape.names, set(shape.names)

    def encode(item: Any) -> bytes | Slot | Row:
        if type(item) is cls and item.__pydantic_extra__ is None and item.__pydantic_private__ is None:
            state, given = item.__dict__, item.__pydantic_fields_set__
            if tuple(state) == names:
                values = tuple(state.values())
                if given == every:
                    if all_scalars(map(type, values)):
                        return values
                    piece = dumps(values)
                else:
                    piece = dumps((*values, given))
                if STACK_GLOBAL not in piece or not shape.hides_itself(piece):
                    return piece
        return dumps([item])

    return encode


@dataclass(slots=True, eq=False)
class Head:
    """
    The keys of dicts, and the types of their values: one object for all that have the same.

    ``met`` is how many of them it took long to recognize.
    """

    names: tuple[str, ...]
    types: tuple[type, ...]
    met: int = 0

    @property
    def spelled(self) -> str:
        """The types by name."""
        return " ".join([kind.__name__ for kind in self.types])


class Keys:
    """What dicts with the same keys, all of them strings, in the same order have in common."""

    def encoder(self, dumps: Dumps) -> Encoder:
        """Return the function that makes of a dict, as it is now, a row, or a pickle by *dumps*."""
        heads: dict[tuple[Any, ...], Head] = {}
        are_strings = frozenset({str}).issuperset
        fits: Callable[[Any], Row | None] = _fits_nothing

        def encode(item: Any) -> bytes | Slot | Row:
            nonlocal fits
            row = fits(item)
            if row is not None:  # nearly always
                return row
            if type(item) is dict:
                keys, values = tuple(item), tuple(item.values())
                kinds = tuple(map(type, keys + values))
                if all_scalars(kinds) and are_strings(kinds[: len(keys)]):
                    head = heads.get((keys, kinds))
                    if head is None:
                        if len(heads) > MOST_HEADS:
                            heads.clear()
                        head = heads[keys, kinds] = Head(keys, kinds[len(keys) :])
                    head.met += 1
                    if head.met % OFTEN == 0 and 0 < len(keys) <= MOST_NAMES:
                        fits = _fitting(head)
                    return head, values
            return dumps(item)

        return encode

    @staticmethod
    def ref(names: tuple[str, ...]) -> bytes:
        """Return what `maker` takes for rows of dicts with these keys."""
        return pickle.dumps((dict, names, False), PROTOCOL)


def _fits_nothing(_: Any) -> None:
    """Recognize no item."""


def _fitting(head: Head) -> Callable[[Any], Row | None]:
    """
    Return what makes a row of a dict with these keys, and values of these types, and of anything else None.

    Written out for them, which takes half the time of looking at any dict. Keys are nearly always the same
    objects; those that were read from a file are equal ones.
    """
    numbers = range(len(head.names))
    values = ", ".join(f"v{i}" for i in numbers) + ","
    keys = ", ".join(f"k{i}" for i in numbers) + ","
    types_fit = " and ".join(f"type(v{i}) is t{i}" for i in numbers)
    keys_fit = " and ".join(f"(k{i} is n{i} or (type(k{i}) is str and k{i} == n{i}))" for i in numbers)
    room: dict[str, Any] = {"head": head}
    room |= {f"n{i}": name for i, name in enumerate(head.names)}
    room |= {f"t{i}": kind for i, kind in enumerate(head.types)}
    return _written(
        f"""
def fits(item):
    if type(item) is dict and len(item) == {len(head.names)}:
        {values} = item.values()
        if {types_fit}:
            {keys} = item
            if {keys_fit}:
                return head, ({values})
    return None
""",
        room,
    )


def _written(source: str, room: dict[str, Any]) -> Callable[[Any], Any]:
    """Return the one function that *source* defines, which sees the names in *room*."""
    defined: dict[str, Callable[[Any], Any]] = {}
    exec(source, room, defined)
    (function,) = defined.values()
    return function


# ── which classes have one ───────────────────────────────────────────────────


def shape_of(cls: Any) -> Shape | None:
    """Return the shape of a class; None if instances are more than their fields or see to it themselves."""
    if not isinstance(cls, type) or cls in copyreg.dispatch_table or not _has(cls, object, "__new__"):
        return None
    is_model = _is_model(cls)
    if not is_model and not dataclasses.is_dataclass(cls):
        return None
    if is_model:
        names: tuple[str, ...] = tuple(cls.model_fields)  # type: ignore[attr-defined]  # a model has them
        ordinary = _has(cls, sys.modules["pydantic"].BaseModel, *PICKLING)
        ordinary = ordinary and not cls.__dict__["__private_attributes__"]
    else:
        names = tuple(field.name for field in dataclasses.fields(cls))
        ordinary = _has(cls, object, *PICKLING) and not _has_slots(cls)
    if not ordinary or not names:
        return None
    try:
        ref = pickle.dumps((cls, names, is_model), PROTOCOL)
    except Exception:  # a class of a function, which has no name to be found by
        return None
    return Shape(cls, names, ref, is_model)


def _is_model(cls: type) -> bool:
    pydantic = sys.modules.get("pydantic")  # no class is a model where nobody has imported it
    return pydantic is not None and issubclass(cls, pydantic.BaseModel)


def _has(cls: type, base: type, *names: str) -> bool:
    """Whether *cls* has what *base* has under these names."""
    return all(getattr(cls, name, None) is getattr(base, name, None) for name in names)


def _has_slots(cls: type) -> bool:
    return not cls.__dictoffset__ or any("__slots__" in base.__dict__ for base in cls.__mro__[:-1])


# ── and back ─────────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=256)
def maker(ref: bytes) -> Builder:
    """Return the function that makes an item of its values; raises whatever finding the class raises."""
    cls, spelled, is_model = pickle.loads(ref)
    names = tuple(map(sys.intern, spelled))  # as attributes are: else each instance finds them more slowly
    if cls is dict:
        return _make_dict(names)
    return _make_model(cls, names) if is_model else _make_by_assignment(cls, names) or _make(cls, names)


@functools.lru_cache(maxsize=256)
def builder(ref: bytes) -> Builder:
    """Return the function that makes items of what was pickled for them; raises as `maker` does."""
    make = maker(ref)

    def build(values: Any) -> Any:
        return make(values) if type(values) is tuple else values[0]

    return build


def restore(ref: bytes, piece: bytes) -> Any:
    """Return the item that *piece* is, for a block of the shape *ref*."""
    return builder(ref)(pickle.loads(piece))


@dataclass(frozen=True)
class Alone:
    """An item's piece and shape, which is unpickled as the item."""

    ref: bytes
    piece: bytes

    def __reduce__(self) -> tuple[Any, ...]:
        """Be the item when loaded."""
        return restore, (self.ref, self.piece)


def _make(cls: type, names: tuple[str, ...]) -> Builder:
    new = object.__new__

    def make(values: tuple[Any, ...]) -> Any:
        made: Any = new(cls)
        made.__dict__.update(zip(names, values, strict=True))
        return made

    return make


def _make_dict(names: tuple[str, ...]) -> Builder:
    """Return what makes a dict by a display, in half the time that `zip` takes."""
    values = [f"v{number}" for number in range(len(names))]
    pairs = ", ".join(f"{name!r}: {value}" for name, value in zip(names, values, strict=True))
    return _written(f"def make(values):\n    {', '.join(values)}, = values\n    return {{{pairs}}}\n", {})


def _make_by_assignment(cls: type, names: tuple[str, ...]) -> Builder | None:
    """
    Return what sets attributes one by one, or None where the class wants a say in it.

    Three times as fast as a dict, and the instance takes half the memory: its class knows the names.
    """
    if not _has(cls, object, "__setattr__"):
        return None
    if any(hasattr(inspect.getattr_static(cls, name, None), "__set__") for name in names):
        return None
    made = ", ".join(f"made.{name}" for name in names)
    source = f"def make(values):\n    made = new(cls)\n    {made}, = values\n    return made\n"
    # Field names are identifiers: `dataclass` has seen to that.
    return _written(source, {"new": object.__new__, "cls": cls})


def _make_model(cls: type, names: tuple[str, ...]) -> Builder:
    """
    Return what fills the model's slots themselves, past its own ``__setattr__``.

    Written out for these names, which takes half the time of one function for all.
    """
    values = "".join(f"v{index}, " for index in range(len(names)))
    state = ", ".join(f"{name!r}: v{index}" for index, name in enumerate(names))
    source = f"""
def make(values):
    if len(values) == {len(names)}:
        {values} = values
        given = every()
    else:
        {values} given = values
    made = new(cls)
    put_state(made, {{{state}}})
    put_given(made, given)
    put_extra(made, None)
    put_private(made, None)
    return made
"""
    slots = sys.modules["pydantic"].BaseModel.__dict__
    room: dict[str, Any] = {
        "new": object.__new__,
        "cls": cls,
        "every": set(names).copy,
        "put_state": slots["__dict__"].__set__,
        "put_given": slots["__pydantic_fields_set__"].__set__,
        "put_extra": slots["__pydantic_extra__"].__set__,
        "put_private": slots["__pydantic_private__"].__set__,
    }
    return _written(source, room)
