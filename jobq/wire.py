"""
What travels between driver and worker, and its bytes.

    driver ── Chunk | Grant ──> worker      (an order: do these jobs / give so many items)
    driver <── Answer ───────── worker      (acknowledgement and outputs in one frame: both count or neither)

The driver never decodes an item. It sees a `Block`: so many items, so many bytes, and how to take a
part of it. Headers are `marshal` (plain numbers and strings, no code), bodies are opaque.

The dataclasses here are facts, and nobody changes one; they aren't ``frozen`` because some are made for
every chunk, and freezing them makes that four times as slow.

A frame: magic, length of the header, length of the body (16 bytes), the header, the body.
"""

from __future__ import annotations

import io
import marshal
import pickle
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import itemgetter
from typing import Any, ClassVar, Protocol, TypeAlias

from jobq.arena import LARGE_BYTES, Arena, Lease, Pickled, Place, Slot, Tenant
from jobq.errors import BrokenChannel
from jobq.handover import SocketPickler
from jobq.shapes import SCALARS, Alone, Head, Keys, Row, Shape, builder, maker

Buffer: TypeAlias = bytes | memoryview

#: Those of them that may be long.
TEXTS = frozenset({str, bytes})
#: What anything else takes, about.
NUMBER_BYTES = 8
#: Lists of texts up to this length in all are pickled as lists.
SMALL_BYTES = 16 * 1024

#: A chunk has no more bytes, unless a single item has: each costs the driver as much as a copy of this.
CHUNK_BYTES = 128 * 1024
#: In the arena there may be so many times more: 16 MiB of items that need only be copied out.
PLACED_WEIGHT = 256

#: Large items are looked for where items have so many bytes on average: else one more is of no weight.
SPARSE_BYTES = 512
#: So many rows are pickled together: fewer take longer, of more a part carries too much of its neighbours.
ROWS = 64
#: Fewer aren't worth it.
FEW_ROWS = 8
#: Rows that are longer are pickled by themselves, so that large ones among them are seen.
WIDE_BYTES = 4096

#: So many items that aren't large, one after the other, and large ones are no longer expected.
SMALL_ROW = 16

PREFIX = struct.Struct("<IIQ")
MAGIC = 0x6A6F6271  # "jobq"
PROTOCOL = 5


class Block(Protocol):
    """Items that were encoded together, opaque to the driver."""

    @property
    def count(self) -> int:
        """How many items."""
        ...

    @property
    def nbytes(self) -> int:
        """How many bytes they take on the wire (0 where items travel by reference)."""
        ...

    @property
    def weight(self) -> int:
        """What they count of the bytes that a chunk may have."""
        ...

    @property
    def shared(self) -> bool:
        """Whether a part of it carries the bytes of all."""
        ...

    def take(self, low: int, high: int) -> Block:
        """Return the items ``low <= i < high``, copying none."""
        ...


@dataclass(slots=True)
class PackedObjects:
    """
    Items pickled one by one, each at its yield.

    ``ends`` holds, as unsigned 64-bit numbers, where each item ends, counted from ``base`` bytes
    before the start of ``body``. ``shape`` is how they become instances of their class (`jobq.shapes`).
    """

    body: Buffer
    ends: bytes
    base: int = 0
    shape: bytes = b""
    shared: ClassVar[bool] = False

    @property
    def count(self) -> int:
        """How many items."""
        return len(self.ends) // 8

    @property
    def nbytes(self) -> int:
        """How many bytes the items take."""
        return len(self.body)

    @property
    def weight(self) -> int:
        """The same."""
        return len(self.body)

    def positions(self) -> array[int]:
        """Return where each item ends, in ``body``'s own count plus ``base``."""
        return _numbers(self.ends)

    def take(self, low: int, high: int) -> PackedObjects:
        """Return the items ``low <= i < high``, copying none."""
        if low == 0 and high == self.count:
            return self
        ends = self.positions()
        start = ends[low - 1] if low else self.base
        stop = ends[high - 1] if high else self.base
        body = memoryview(self.body)[start - self.base : stop - self.base]
        return PackedObjects(body, self.ends[low * 8 : high * 8], start, self.shape)

    def pickled(self) -> bytes:
        """Return the pickle of the only item."""
        return pickle.dumps(Alone(self.shape, bytes(self.body)), PROTOCOL) if self.shape else bytes(self.body)

    def header(self) -> tuple[Any, ...]:
        """Return what the other side needs besides the body."""
        return ("o", self.ends, self.base, self.shape)


@dataclass(slots=True)
class PackedPlaced(PackedObjects):
    """Items of which some lie in the arena: those have a place, and no bytes in ``body``."""

    places: tuple[Place | None, ...] = ()
    placed: int = field(init=False)  # bytes in the arena

    def __post_init__(self) -> None:
        self.placed = sum([place.length for place in self.places if place is not None])

    @property
    def nbytes(self) -> int:
        """How many bytes the items take, wherever they lie."""
        return len(self.body) + self.placed

    @property
    def weight(self) -> int:
        """Less than they take: what lies in the arena need not travel."""
        return len(self.body) + self.placed // PLACED_WEIGHT

    def take(self, low: int, high: int) -> PackedPlaced:
        """Return the items ``low <= i < high``, copying none."""
        if low == 0 and high == self.count:
            return self
        rest = PackedObjects.take(self, low, high)
        return PackedPlaced(rest.body, rest.ends, rest.base, self.shape, self.places[low:high])

    def pickled(self) -> bytes:
        """Return the pickle of the only item."""
        return self.owned().pickled()

    def owned(self) -> PackedObjects:
        """Return the same items, none of them in the arena. For the driver's process."""
        pieces = [
            place.read() if isinstance(place, Lease) else PackedObjects.take(self, index, index + 1).body
            for index, place in enumerate(self.places)
        ]
        return PackedObjects(b"".join(pieces), _ends(pieces), 0, self.shape)

    def header(self) -> tuple[Any, ...]:
        """Return what the other side needs besides the body."""
        places = tuple(None if place is None else place.told() for place in self.places)
        return ("p", self.ends, self.base, self.shape, places)


def owned(block: Block) -> Block:
    """Return a block that takes no room in the arena, however long somebody keeps it."""
    return block.owned() if isinstance(block, PackedPlaced) else block


def _numbers(packed: bytes) -> array[int]:
    numbers = array("Q")
    numbers.frombytes(packed)
    return numbers


def _ends(pieces: Sequence[Buffer | Slot]) -> bytes:
    return array("Q", accumulate(map(len, pieces))).tobytes()


@dataclass(slots=True)
class PackedScalars:
    """
    Numbers, strings, bytes and None pickled as one list, of which ``low <= i < high`` are meant.

    ``only`` names the type that all of them have; "" where they differ.
    """

    body: Buffer
    total: int
    low: int
    high: int
    only: str = ""
    shared: ClassVar[bool] = True

    @property
    def count(self) -> int:
        """How many items."""
        return self.high - self.low

    @property
    def nbytes(self) -> int:
        """This part's share of the body's bytes."""
        return len(self.body) * (self.high - self.low) // (self.total or 1)

    @property
    def weight(self) -> int:
        """The same."""
        return self.nbytes

    def take(self, low: int, high: int) -> PackedScalars:
        """Return the items ``low <= i < high``: the same body, a narrower view."""
        return PackedScalars(self.body, self.total, self.low + low, self.low + high, self.only)

    def header(self) -> tuple[Any, ...]:
        """Return what the other side needs besides the body."""
        return ("s", self.total, self.low, self.high, self.only)


@dataclass(slots=True)
class PackedRows:
    """
    Items that are rows (`jobq.shapes`), `ROWS` pickled together, of which ``low <= i < high`` are meant.

    ``ends`` and ``base`` say where each list of rows ends, as in `PackedObjects`. ``whole`` is how many
    bytes and items the block had before it was cut. ``types`` are those of every row's values, by name; ""
    where they differ, or weren't looked at. ``rows`` are its rows where they were loaded.
    """

    body: Buffer
    ends: bytes
    base: int
    low: int
    high: int
    shape: bytes
    whole: tuple[int, int]
    types: str = ""
    rows: list[Row] | None = None
    shared: ClassVar[bool] = False

    @property
    def count(self) -> int:
        """How many items."""
        return self.high - self.low

    @property
    def nbytes(self) -> int:
        """This part's share of the bytes."""
        return self.whole[0] * self.count // self.whole[1]

    @property
    def weight(self) -> int:
        """The same."""
        return self.nbytes

    def positions(self) -> array[int]:
        """Return where each list ends, in ``body``'s own count plus ``base``."""
        return _numbers(self.ends)

    def take(self, low: int, high: int) -> PackedRows:
        """Return the items ``low <= i < high``, with those that were pickled with them."""
        low, high = self.low + low, self.low + high
        body, ends, base, rows = self.body, self.ends, self.base, self.rows
        if rows is None:
            first, last = low // ROWS, max(low, high - 1) // ROWS
            positions = self.positions()
            start, stop = positions[first - 1] if first else base, positions[last]
            body = memoryview(body)[start - base : stop - base]
            ends, base = ends[first * 8 : (last + 1) * 8], start
            low, high = low - first * ROWS, high - first * ROWS
        return PackedRows(body, ends, base, low, high, self.shape, self.whole, self.types, rows)

    def load(self) -> list[Row]:
        """Return the rows that are meant. Loading them runs nobody's code."""
        if self.rows is None:
            self.rows = []
            body, low = memoryview(self.body), 0
            for end in self.positions():
                self.rows += pickle.loads(body[low : end - self.base])
                low = end - self.base
        return self.rows if self.count == len(self.rows) else self.rows[self.low : self.high]

    def pickled(self) -> bytes:
        """Return the pickle of the only item."""
        return pickle.dumps(Alone(self.shape, pickle.dumps(self.load()[0], PROTOCOL)), PROTOCOL)

    def header(self) -> tuple[Any, ...]:
        """Return what the other side needs besides the body."""
        return ("r", self.ends, self.base, self.low, self.high, self.shape, self.whole, self.types)


@dataclass(slots=True)
class References:
    """Items that travel by reference (threads, the calling thread): nothing is pickled."""

    items: list[Any]
    shared: ClassVar[bool] = False

    @property
    def count(self) -> int:
        """How many items."""
        return len(self.items)

    @property
    def nbytes(self) -> int:
        """Zero: nothing is copied, and nobody knows how large the objects are."""
        return 0

    @property
    def weight(self) -> int:
        """Zero."""
        return 0

    def take(self, low: int, high: int) -> References:
        """Return the items ``low <= i < high``."""
        return References(self.items[low:high])


@dataclass(slots=True)
class Counted:
    """Items that nobody wants: only their number travels."""

    count: int
    nbytes: ClassVar[int] = 0
    weight: ClassVar[int] = 0
    shared: ClassVar[bool] = False
    body: ClassVar[bytes] = b""

    def take(self, low: int, high: int) -> Counted:
        """Return so many."""
        return Counted(high - low)

    def header(self) -> tuple[Any, ...]:
        """Return what the other side needs: the number."""
        return ("n", self.count)


PackedBlock: TypeAlias = PackedObjects | PackedScalars | PackedRows | Counted


# ── what is said ─────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Part:
    """
    Jobs of one stage with consecutive numbers: ``first``, ``first + 1``, …

    All have the same ``attempt`` and ``delivery`` (both from 1). ``keys`` are theirs where the stage has
    a key; ``roots`` name the source items they descend from, where somebody waits for those.
    """

    first: int
    block: Block
    attempt: int = 1
    delivery: int = 1
    keys: tuple[str, ...] | None = None
    roots: tuple[int, ...] | None = None

    def take(self, low: int, high: int) -> Part:
        """Return the jobs ``low <= i < high`` of this part."""
        if low == 0 and high == self.block.count:
            return self
        return Part(
            self.first + low,
            self.block.take(low, high),
            self.attempt,
            self.delivery,
            self.keys[low:high] if self.keys is not None else None,
            self.roots[low:high] if self.roots is not None else None,
        )


@dataclass(slots=True)
class Chunk:
    """
    Jobs that travel together to a consumer.

    ``number`` is how many jobs this worker was sent before: the job at index i of the chunk has the
    *ticket* ``number + i``, by which the worker's page speaks of it.
    """

    number: int
    parts: tuple[Part, ...]
    count: int


@dataclass(slots=True)
class Grant:
    """
    Leave for a producer to give ``count`` more items of ``nbytes`` in all.

    ``number`` is how many items this worker was granted before. Bytes may be exceeded by one item, which
    then ends the grant. Answered as a chunk is, by ``number``.
    """

    number: int
    count: int
    nbytes: int


Order: TypeAlias = Chunk | Grant


@dataclass(frozen=True, slots=True)
class Failure:
    """
    A job that raised, as text: the driver can always read it.

    ``index`` counts from the chunk's first job (-1: the producer itself). ``verdict`` is "error"
    (retried if ``retriable`` and attempts are left), "retry" (``Retry``), "reject" or "payload" (never
    retried). ``item_json`` is the item as JSON text where it has that form. ``exception`` is the
    pickled exception, which may fail to load.
    """

    index: int
    verdict: str
    error: str
    message: str
    traceback: str
    retriable: bool = False
    delay: float | None = None
    item_type: str | None = None
    item_json: str | None = None
    item_repr: str | None = None
    exception: bytes | None = None
    item: Buffer | None = None


@dataclass(slots=True)
class Output:
    """
    Items that jobs of one chunk gave to one route.

    ``parents`` holds, as unsigned 32-bit numbers, the index in the chunk of the job that gave each
    item; None: one item for each settled job, in order. ``keys`` holds, for each taker of the route
    that has a key, its place among the takers and the items' keys (or ``("!", why)`` where there is none).
    """

    route: int
    block: Block
    parents: bytes | None = None
    keys: tuple[tuple[int, tuple[Any, ...]], ...] = ()

    def parent_indices(self) -> array[int] | None:
        """Return ``parents`` as numbers."""
        if self.parents is None:
            return None
        indices = array("I")
        indices.frombytes(self.parents)
        return indices


@dataclass(slots=True)
class Totals:
    """
    What this worker has done since it began, counted by the worker itself.

    The driver's books are compared with these at the end of the run.
    """

    done: int = 0
    filtered: int = 0
    failed: int = 0
    emitted: tuple[int, ...] = ()


@dataclass(slots=True)
class Answer:
    """
    Jobs of chunk ``number`` are settled, and this is what they gave: one frame, so both count or neither.

    ``settled`` are index ranges ``(low, high)`` of jobs that are done or filtered (the indices of the
    filtered ones are in ``filtered`` too); failed ones are in ``failures`` alone. ``final``: the chunk is
    answered whole, but for jobs that were taken back. For a producer ``settled`` counts items given under
    the grant, and ``ended`` says that there are no more.
    ``notes`` are what jobs said of their progress: ``(index, done, total)``. ``skipped`` are the indices of
    jobs that will not begin here, taken back or not: the limit was below their ticket when it was looked at.
    ``leaving`` says why this worker begins no more jobs, if it doesn't: those of which a final answer says
    nothing go to others.
    """

    number: int
    final: bool
    settled: tuple[tuple[int, int], ...] = ()
    filtered: tuple[int, ...] = ()
    failures: tuple[Failure, ...] = ()
    outputs: tuple[Output, ...] = ()
    totals: Totals = field(default_factory=Totals)
    busy: float = 0.0
    ended: bool = False
    notes: tuple[tuple[int, float | None, float | None], ...] = ()
    skipped: tuple[int, ...] = ()
    leaving: str = ""


@dataclass(frozen=True, slots=True)
class Hello:
    """The worker is up: what comes before it never counts as a job's time."""

    pid: int


@dataclass(frozen=True, slots=True)
class Bye:
    """The worker's last word. ``problem`` is a traceback if it ends because it can't work."""

    problem: str | None = None


Said: TypeAlias = Answer | Hello | Bye


# ── how items become blocks ──────────────────────────────────────────────────


class Codec(Protocol):
    """How a backend's workers turn items into blocks. Same-named methods of both codecs agree."""

    @property
    def encode(self) -> Callable[[Any], Any]:
        """Returns an item as it is now, as one piece; raises whatever pickling it raises."""
        ...

    @property
    def by_reference(self) -> bool:
        """Whether pieces are the items themselves."""
        ...

    def size(self, piece: Any) -> int:
        """Return the bytes of one piece."""
        ...

    def block(self, pieces: Sequence[Any]) -> Block:
        """Return encoded pieces as a block."""
        ...

    def scalars(self, items: list[Any]) -> Block:
        """Return items, all of exact `SCALARS` types, as a block."""
        ...

    @property
    def undecoded(self) -> int:
        """How many items could not be decoded so far."""
        ...

    def shaped(self, shape: Shape | Keys) -> Codec:
        """Return the codec for items that nearly all have *shape*."""
        ...

    @property
    def by_rows(self) -> bool:
        """Whether pieces may be rows: snapshots that are not pickled yet, however many there are."""
        ...

    def decode(self, block: Block) -> list[Any]:
        """Return a block's items; one that can't be decoded is an `Undecodable` in its place."""
        ...


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Stands for an item that could not be loaded."""

    error: BaseException


class PickleCodec:
    """Each item is pickled by itself, at its yield; scalars as one list."""

    by_reference: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False

    def __init__(self, arena: Arena | Tenant | None = None) -> None:
        self.undecoded = 0
        self.sockets = SocketPickler(CHUNK_BYTES)
        self._arena = arena
        self._small = 0
        #: Return an item pickled, large ones in the arena if there is room.
        self.encode: Callable[[Any], Any] = self.sockets.dumps  # Any: bytes or a slot

    def size(self, piece: bytes | Slot) -> int:
        """Return the bytes of one piece."""
        return len(piece)

    def block(self, pieces: Sequence[Any]) -> PackedBlock:
        """Return encoded items as a block."""
        return self.objects(pieces)

    def objects(self, pieces: Sequence[bytes | Slot]) -> PackedObjects:
        """Return pickled items as a block."""
        ends = array("Q", accumulate(map(len, pieces)))
        length = ends[-1] if ends else 0
        if length >= LARGE_BYTES and self._arena is not None and length >= SPARSE_BYTES * len(ends):
            return self._placed([self._place(piece) for piece in pieces])
        try:
            return PackedObjects(b"".join(pieces), ends.tobytes())  # type: ignore[arg-type]
        except TypeError:  # a slot is no bytes
            return self._placed(pieces)

    # Whether an item is large is known when it is pickled. So the first one is pickled into bytes, which are
    # then copied; after it, items are pickled piecemeal, and long contents copied straight into the arena.

    def _place(self, piece: bytes | Slot) -> bytes | Slot:
        if len(piece) < LARGE_BYTES or type(piece) is not bytes:
            return piece
        assert self._arena is not None
        pickled = Pickled()
        pickled.write(piece)
        self._expect_large()
        return self._arena.place(pickled) or piece

    def _expect_large(self) -> None:
        self._small, self.sockets.dump = 0, self._dump_large

    def _dump_large(self, item: Any, protocol: int) -> bytes | Slot:
        assert self._arena is not None
        pickled = Pickled()
        pickle.Pickler(pickled, protocol).dump(item)
        if pickled.length >= LARGE_BYTES:
            self._small = 0
            return self._arena.place(pickled) or bytes(pickled)
        self._small += 1
        if self._small >= SMALL_ROW:
            self.sockets.dump = pickle.dumps
        return bytes(pickled)

    @staticmethod
    def _placed(pieces: Sequence[bytes | Slot]) -> PackedObjects:
        places = tuple(piece if isinstance(piece, Slot) else None for piece in pieces)
        inline = [b"" if isinstance(piece, Slot) else piece for piece in pieces]
        return PackedPlaced(b"".join(inline), _ends(inline), places=places)

    def scalars(self, items: list[Any]) -> PackedBlock:
        """
        Return scalars as a block; each is pickled by itself should one be something else after all.

        So are long texts: a part of a list can't be taken out of its pickle, and to send all for a part of it
        is cheap only while it is small.
        """
        first = type(items[0]) if items else type(None)
        same = list(map(type, items)).count(first) == len(items)  # takes two thirds of what a set takes
        types = {first} if same else set(map(type, items))
        small = types.isdisjoint(TEXTS) or _length(items, types) <= SMALL_BYTES
        if small and types <= SCALARS:
            only = first.__name__ if same else ""
            return PackedScalars(pickle.dumps(items, PROTOCOL), len(items), 0, len(items), only)
        if self._arena is not None and any(len(item) >= LARGE_BYTES for item in items if type(item) in TEXTS):
            self._expect_large()
        return self.objects([self.encode(item) for item in items])

    def shaped(self, shape: Shape | Keys) -> Codec:
        """Return the codec for items that nearly all have *shape*."""
        return KeyedCodec(shape, self._arena) if isinstance(shape, Keys) else ShapedCodec(shape, self._arena)

    @staticmethod
    def _loads(shape: bytes) -> Callable[[Any], Any]:
        """Return what loads an item of a shape, or raises for each why the shape can't be had."""
        loads = pickle.loads

        def load(piece: Any) -> Any:
            return builder(shape)(loads(piece))

        try:
            build = builder(shape)
        except BaseException:  # the class can't be found here: each item says so
            return load
        return lambda piece: build(loads(piece))

    def decode(self, block: Block) -> list[Any]:
        """Return the items of a packed block."""
        if isinstance(block, PackedScalars):
            items: list[Any] = pickle.loads(block.body)
            return items if block.count == block.total else items[block.low : block.high]
        if isinstance(block, PackedRows):
            return self._made(block)
        assert isinstance(block, PackedObjects)
        loads = self._loads(block.shape) if block.shape else pickle.loads
        if type(block) is PackedPlaced:
            return [self._load_at(block, index, loads) for index in range(block.count)]
        body = memoryview(block.body)
        low, items = 0, []
        append: Callable[[Any], None] = items.append
        for end in block.positions():
            high = end - block.base
            try:
                append(loads(body[low:high]))
            except BaseException as error:  # user code runs in it
                self.undecoded += 1
                append(Undecodable(error))
            low = high
        return items

    def _made(self, block: PackedRows) -> list[Any]:
        """Return the items that rows stand for."""
        rows = block.load()
        try:
            return list(map(maker(block.shape), rows))
        except BaseException as error:  # the class can't be found here
            self.undecoded += len(rows)
            return [Undecodable(error)] * len(rows)

    def _load_at(self, block: PackedPlaced, index: int, loads: Callable[[Any], Any]) -> Any:
        """Return one item, which may lie in the arena; it shares no memory with it."""
        assert self._arena is not None
        place = block.places[index]
        try:
            if place is None:
                return loads(PackedObjects.take(block, index, index + 1).body)
            return loads(self._arena.view(place))
        except BaseException as error:  # user code runs in it
            self.undecoded += 1
            return Undecodable(error)


class RowCodec(PickleCodec):
    """Items that are rows leave together, anything else is pickled at its yield."""

    by_rows: ClassVar[bool] = True

    def __init__(self, arena: Arena | Tenant | None = None) -> None:
        super().__init__(arena)
        self._row_bytes = SPARSE_BYTES  # as they came last

    def size(self, piece: bytes | Slot | Row) -> int:
        """Return the bytes of one piece: of a row, which is not pickled yet, about how many it will have."""
        if type(piece) is not tuple:
            return len(piece)
        return length_of(piece)

    def block(self, pieces: Sequence[Any]) -> PackedBlock:
        """Return encoded items as a block."""
        packed = self._together(pieces) if self._row_bytes < WIDE_BYTES else None
        if packed is not None:
            return packed
        block = self.objects([self._pickled(one) if type(one) is tuple else one for one in pieces])
        self._row_bytes = block.nbytes // (len(pieces) or 1)
        return block

    def _together(self, pieces: Sequence[Any]) -> PackedRows | None:
        """Return enough rows of one shape as a block; None if that is not what *pieces* are."""
        if len(pieces) < FEW_ROWS or list(map(type, pieces)).count(tuple) != len(pieces):
            return None
        ref, types, rows = self._rows(pieces)
        return self._packed(ref, types, rows) if ref else None

    def _rows(self, pieces: Sequence[Row]) -> tuple[bytes, str, Sequence[Row]]:
        """Return of what shape and types all rows are, and their values alone; b"" if they differ."""
        raise NotImplementedError

    def _pickled(self, row: Row) -> Any:  # bytes or a slot, as `encode`
        """Return a row as it would be pickled alone."""
        raise NotImplementedError

    def _packed(self, ref: bytes, types: str, rows: Sequence[Row]) -> PackedRows:
        file = io.BytesIO()
        pickler = pickle.Pickler(file, PROTOCOL)
        pickler.fast = True  # no memo: what is in a row refers to nothing
        ends = array("Q")
        for low in range(0, len(rows), ROWS):
            pickler.dump(rows[low : low + ROWS])
            ends.append(file.tell())
        body = file.getvalue()
        self._row_bytes = len(body) // len(rows)
        return PackedRows(body, ends.tobytes(), 0, 0, len(rows), ref, (len(body), len(rows)), types)


class ShapedCodec(RowCodec):
    """Items of one class are the values of their fields, anything else is pickled as ever."""

    def __init__(self, shape: Shape, arena: Arena | Tenant | None = None) -> None:
        super().__init__(arena)
        self._ref = shape.ref
        self.encode = shape.encoder(self.sockets.dumps)

    def _rows(self, pieces: Sequence[Row]) -> tuple[bytes, str, Sequence[Row]]:
        return self._ref, "", pieces

    def _pickled(self, row: Row) -> Any:
        return self.sockets.dumps(row)

    def objects(self, pieces: Sequence[bytes | Slot]) -> PackedObjects:
        """Return pickled items as a block."""
        block = super().objects(pieces)
        block.shape = self._ref
        return block


class KeyedCodec(RowCodec):
    """Dicts of scalars are their values, and their keys once for all that have the same; see `RowCodec`."""

    def __init__(self, keys: Keys, arena: Arena | Tenant | None = None) -> None:
        super().__init__(arena)
        self.encode = keys.encoder(self.sockets.dumps)
        self._ref = keys.ref

    def size(self, piece: bytes | Slot | Row) -> int:
        """Return the bytes of one piece; keys are said once for many."""
        return super().size(piece[1] if type(piece) is tuple else piece)

    def _rows(self, pieces: Sequence[Row]) -> tuple[bytes, str, Sequence[Row]]:
        heads: list[Head] = list(map(itemgetter(0), pieces))
        names, alike = heads[0].names, heads.count(heads[0]) == len(heads)
        if not names or not (alike or all(head.names == names for head in set(heads))):
            return b"", "", pieces
        return self._ref(names), heads[0].spelled if alike else "", list(map(itemgetter(1), pieces))

    def _pickled(self, row: Row) -> Any:
        head, values = row
        return self.sockets.dumps(dict(zip(head.names, values, strict=True)))


def length_of(values: Sequence[Any]) -> int:
    """Return the bytes that scalars take, about."""
    return sum([len(value) if type(value) in TEXTS else NUMBER_BYTES for value in values])


def _length(items: list[Any], types: set[type]) -> int:
    """Return the length of all texts among *items*."""
    if types <= TEXTS:
        return sum(map(len, items))
    return sum(len(item) for item in items if type(item) in TEXTS)


class ReferenceCodec:
    """Items are handed over as they are."""

    by_reference: ClassVar[bool] = True
    by_rows: ClassVar[bool] = False
    undecoded: ClassVar[int] = 0

    def shaped(self, shape: Shape | Keys) -> Codec:  # noqa: ARG002  # the protocol's name
        """Return this one: nothing is encoded."""
        return self

    def encode(self, item: Any) -> Any:
        """Return *item* itself."""
        return item

    def size(self, piece: Any) -> int:  # noqa: ARG002  # the protocol's name
        """Return 0: nothing is copied."""
        return 0

    def block(self, pieces: Sequence[Any]) -> References:
        """Return the items as a block."""
        return References(list(pieces))

    def scalars(self, items: list[Any]) -> References:
        """Return the items as a block."""
        return References(items)

    def decode(self, block: Block) -> list[Any]:
        """Return the items."""
        assert isinstance(block, References)
        return block.items


# ── frames ───────────────────────────────────────────────────────────────────


def pack(message: Order | Said) -> list[Buffer]:
    """Return the frame of *message* as buffers to be written one after the other."""
    buffers: list[Buffer] = [b"", b""]
    header = marshal.dumps(_PACKERS[type(message)](message, buffers))
    buffers[0] = PREFIX.pack(MAGIC, len(header), sum(map(len, buffers)))
    buffers[1] = header
    return buffers


def frame_length(start: Buffer) -> int | None:
    """
    Return the length of the frame that *start* begins, or None if its prefix is not whole yet.

    Raises `BrokenChannel` if this is no frame of ours.
    """
    if len(start) < PREFIX.size:
        return None
    magic, header, body = PREFIX.unpack_from(start)
    if magic != MAGIC:
        raise BrokenChannel("garbage on the channel: a job wrote into a descriptor that is not its own?")
    return PREFIX.size + int(header) + int(body)


def unpack(frame: Buffer, place: Callable[[int, int, int, int], Place] = Place) -> Order | Said:
    """
    Return the message of one whole frame. Blocks refer to *frame*'s memory, they don't copy it.

    *place* makes of its numbers what stands for the place of an item.
    """
    view = memoryview(frame)
    _, header_length, _ = PREFIX.unpack_from(view)
    start = PREFIX.size + header_length
    fields = marshal.loads(view[PREFIX.size : start])
    return _UNPACKERS[fields[0]](fields, _Bodies(view, start, place))


class _Bodies:
    """Hands out the bodies of a frame in the order in which they were put in."""

    __slots__ = ("at", "place", "view")

    def __init__(self, view: memoryview, at: int, place: Callable[[int, int, int, int], Place]) -> None:
        self.view = view
        self.at = at
        self.place = place

    def next(self, length: int) -> memoryview:
        at = self.at
        self.at = at + length
        return self.view[at : at + length]


def _pack_block(block: Block, buffers: list[Buffer]) -> tuple[Any, ...]:
    assert isinstance(block, PackedObjects | PackedScalars | PackedRows | Counted)
    buffers.append(block.body)
    return (len(block.body), *block.header())


def _unpack_block(fields: Sequence[Any], bodies: _Bodies) -> PackedBlock:
    length, kind, *rest = fields
    if kind == "n":
        return Counted(*rest)
    body = bodies.next(length)
    if kind == "r":
        return PackedRows(body, *rest)
    if kind == "p":
        ends, base, shape, places = rest
        placed = tuple(None if numbers is None else bodies.place(*numbers) for numbers in places)
        return PackedPlaced(body, ends, base, shape, placed)
    return PackedObjects(body, *rest) if kind == "o" else PackedScalars(body, *rest)


def _pack_chunk(chunk: Chunk, buffers: list[Buffer]) -> tuple[Any, ...]:
    parts = [
        (part.first, part.attempt, part.delivery, part.keys, _pack_block(part.block, buffers))
        for part in chunk.parts
    ]
    return ("c", chunk.number, chunk.count, parts)


def _unpack_chunk(fields: Sequence[Any], bodies: _Bodies) -> Chunk:
    _, number, count, parts = fields
    return Chunk(
        number,
        tuple(
            [
                Part(first, _unpack_block(block, bodies), attempt, delivery, keys)
                for first, attempt, delivery, keys, block in parts
            ]
        ),
        count,
    )


def _pack_answer(answer: Answer, buffers: list[Buffer]) -> tuple[Any, ...]:
    outputs = [
        (output.route, output.parents, output.keys, _pack_block(output.block, buffers))
        for output in answer.outputs
    ]
    totals = answer.totals
    return (
        "a",
        (answer.number, answer.final, answer.settled, answer.filtered),
        [_fields(failure) for failure in answer.failures],
        outputs,
        (totals.done, totals.filtered, totals.failed, totals.emitted),
        (answer.busy, answer.ended, answer.notes, answer.skipped, answer.leaving),
    )


def _unpack_answer(fields: Sequence[Any], bodies: _Bodies) -> Answer:
    _, head, failures, outputs, totals, tail = fields
    number, final, settled, filtered = head
    return Answer(
        number,
        final,
        settled,
        filtered,
        tuple([Failure(*failure) for failure in failures]),
        tuple(
            [
                Output(route, _unpack_block(block, bodies), parents, keys)
                for route, parents, keys, block in outputs
            ]
        ),
        Totals(*totals),
        *tail,
    )


def _fields(failure: Failure) -> tuple[Any, ...]:
    return tuple(getattr(failure, name) for name in Failure.__slots__)


_PACKERS: dict[type, Callable[[Any, list[Buffer]], tuple[Any, ...]]] = {
    Chunk: _pack_chunk,
    Grant: lambda grant, _: ("g", grant.number, grant.count, grant.nbytes),
    Answer: _pack_answer,
    Hello: lambda hello, _: ("h", hello.pid),
    Bye: lambda bye, _: ("b", bye.problem),
}
_UNPACKERS: dict[str, Callable[[Sequence[Any], _Bodies], Order | Said]] = {
    "c": _unpack_chunk,
    "g": lambda fields, _: Grant(*fields[1:]),
    "a": _unpack_answer,
    "h": lambda fields, _: Hello(fields[1]),
    "b": lambda fields, _: Bye(fields[1]),
}
