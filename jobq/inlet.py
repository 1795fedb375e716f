"""Where items from outside come in: submitted by any thread of the program, queued by the driver."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from jobq.errors import JobqError
from jobq.lineage import Fate
from jobq.wire import Block, Codec

#: Stages by name that take an item, with its keys there.
Takers: TypeAlias = tuple[tuple[str, tuple[Any, ...] | None], ...]


@dataclass(slots=True)
class Entry:
    """One submitted item on its way to the driver. Nobody changes it."""

    takers: Takers
    piece: Any
    root: int


class Entrance(Protocol):
    """Where the driver takes items that don't come from producers."""

    @property
    def entries(self) -> tuple[str, ...]:
        """The stages that items come to."""
        ...

    @property
    def busy(self) -> bool:
        """Whether something may still come of it."""
        ...

    @property
    def is_empty(self) -> bool:
        """Whether nothing has come; whoever changes that wakes the driver afterwards."""
        ...

    def take(self) -> Iterable[tuple[Takers, Block, tuple[int, ...] | None]]:
        """Yield what has come: who takes it, and the source items' numbers if they are followed."""
        ...

    def allow(self, name: str, room: int, room_bytes: int) -> None:
        """Take it from the driver that so many items, and bytes, more may come to a stage."""
        ...

    def settle(self, settled: Iterable[tuple[int, Fate]]) -> None:
        """Take it from the driver what became of source items."""
        ...


class Inlet:
    """
    Submitted items and what became of them. An `Entrance`.

    The room that a stage has is told by the driver (`allow`); `put` waits for it. ``wake`` makes the driver
    look; *settled* is called in the driver's thread with each source item whose last descendant is settled.
    """

    def __init__(self, entries: Sequence[str], codec: Codec, settled: Callable[[int, Fate], None]) -> None:
        self.entries = tuple(entries)
        self.open = True
        self.wake: Callable[[], None] = lambda: None
        #: What to do until something holds, while `put` has to wait: None waits for another thread to drive.
        self.pump: Callable[[Callable[[], bool]], object] | None = None
        self._codec = codec
        self._settled = settled
        self._coming: deque[Entry] = deque()
        self._room = dict.fromkeys(entries, 0)
        self._room_bytes = dict.fromkeys(entries, 0)
        self._asked = False  # somebody waits for room
        self._told = False  # the driver was woken, and has not looked yet
        self._changed = threading.Condition()

    @property
    def busy(self) -> bool:
        """Whether something may still come of it."""
        return self.open or bool(self._coming)  # in this order: once closed, nothing more is appended

    def put(self, entry: Entry) -> None:
        """Hand over one item, waiting while a stage that takes it is full; raises `JobqError` once closed."""
        names = [name for name, _ in entry.takers]
        while not self._accept(entry, names):
            if self.pump is not None:
                self.pump(lambda: self._has_room(names) or not self.open)

    def _has_room(self, names: Sequence[str]) -> bool:
        return all(self._room[name] > 0 and self._room_bytes[name] > 0 for name in names)

    def _accept(self, entry: Entry, names: Sequence[str]) -> bool:
        """Take *entry* if there is room for it, else wait for a change if another thread drives."""
        with self._changed:
            if not self.open:
                raise JobqError("this run takes no more items: it has ended, or is being stopped")
            if not self._has_room(names):
                self._asked = True
                self.wake()
                if self.pump is None:
                    self._changed.wait()
                return False
            self._coming.append(entry)  # before it takes room: see `_knows_enough`
            size = self._codec.size(entry.piece)
            for name in names:
                self._room[name] -= 1
                self._room_bytes[name] -= size
            if not self._told:
                self._told = True
                self.wake()
            return True

    @property
    def is_empty(self) -> bool:
        """Whether nothing has come; whoever changes that wakes the driver afterwards."""
        return not self._coming

    def take(self) -> Iterable[tuple[Takers, Block, tuple[int, ...]]]:
        """Yield what has come, items in a row with the same takers as one block."""
        with self._changed:
            coming, self._coming = self._coming, deque()
            self._told = False
        while coming:
            row = [coming.popleft()]
            while coming and _go_together(coming[0], row[0]):
                row.append(coming.popleft())
            yield (
                row[0].takers if len(row) == 1 else _with_all_keys(row),
                self._codec.block([entry.piece for entry in row]),
                tuple([entry.root for entry in row]),
            )

    def allow(self, name: str, room: int, room_bytes: int = 1 << 62) -> None:
        """Take it from the driver that so many items, and bytes, more may come to a stage."""
        if not self._asked and self._knows_enough(name, room, room_bytes):
            return
        with self._changed:
            coming = [entry.piece for entry in self._coming for taker, _ in entry.takers if taker == name]
            self._room[name] = room - len(coming)
            self._room_bytes[name] = room_bytes - sum(map(self._codec.size, coming))
            if self._asked and self._room[name] > 0 and self._room_bytes[name] > 0:
                self._asked = False
                self._changed.notify_all()

    def _knows_enough(self, name: str, room: int, room_bytes: int) -> bool:
        """Whether what it knows is no more than there is, and not so little that it will soon be asked."""
        if self._coming:  # looked at first, and without a lock: what comes from now on takes of what is known
            return False
        known, known_bytes = self._room[name], self._room_bytes[name]
        return room // 2 < known <= room and room_bytes // 2 < known_bytes <= room_bytes

    def settle(self, settled: Iterable[tuple[int, Fate]]) -> None:
        """Pass on what became of source items."""
        for root, fate in settled:
            self._settled(root, fate)

    def close(self) -> None:
        """Take nothing more; whoever waits in `put` gets an error. The driver is not woken any more."""
        with self._changed:
            if self.open:
                self.open = False
                wake, self.wake = self.wake, lambda: None
                wake()  # last: Ctrl-C may strike in it
            self._changed.notify_all()


def _go_together(one: Entry, other: Entry) -> bool:
    """Whether two items are taken by the same stages."""
    if one.takers is other.takers:  # nearly always, where no stage has a key
        return True
    return [name for name, _ in one.takers] == [name for name, _ in other.takers]


def _with_all_keys(row: Sequence[Entry]) -> Takers:
    """Return the takers of the items of a row, with the keys of all."""
    return tuple(
        (name, None if keys is None else tuple(_keys(row, place)))
        for place, (name, keys) in enumerate(row[0].takers)
    )


def _keys(row: Sequence[Entry], place: int) -> Iterable[Any]:
    for entry in row:
        yield from entry.takers[place][1] or ()
