"""Where items from outside come in: submitted by any thread of the program, queued by the driver."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from jobq.errors import JobqError
from jobq.lineage import Fate
from jobq.wire import Block, Codec

#: Stages by name that take an item, with its keys there.
Takers: TypeAlias = tuple[tuple[str, tuple[Any, ...] | None], ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One submitted item on its way to the driver."""

    takers: Takers
    piece: Any
    root: int


class Inlet:
    """
    Submitted items and what became of them.

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
            for name in names:
                self._room[name] -= 1
                self._room_bytes[name] -= self._codec.size(entry.piece)
            self._coming.append(entry)
            if not self._told:
                self._told = True
                self.wake()
            return True

    def take(self) -> Iterable[tuple[Takers, Block, tuple[int, ...]]]:
        """Yield what has come, items in a row with the same takers as one block."""
        if not self._coming:  # whoever appends wakes the driver afterwards
            return
        with self._changed:
            coming, self._coming = self._coming, deque()
            self._told = False
        while coming:
            names = [name for name, _ in coming[0].takers]
            row = [coming.popleft()]
            while coming and [name for name, _ in coming[0].takers] == names:
                row.append(coming.popleft())
            takers = tuple(
                (name, None if row[0].takers[place][1] is None else tuple(_keys(row, place)))
                for place, name in enumerate(names)
            )
            yield (
                takers,
                self._codec.block([entry.piece for entry in row]),
                tuple(entry.root for entry in row),
            )

    def allow(self, name: str, room: int, room_bytes: int = 1 << 62) -> None:
        """Take it from the driver that so many items, and bytes, more may come to a stage."""
        with self._changed:
            coming = [entry.piece for entry in self._coming for taker, _ in entry.takers if taker == name]
            self._room[name] = room - len(coming)
            self._room_bytes[name] = room_bytes - sum(map(self._codec.size, coming))
            if self._asked and self._room[name] > 0 and self._room_bytes[name] > 0:
                self._asked = False
                self._changed.notify_all()

    def settle(self, settled: Iterable[tuple[int, Fate]]) -> None:
        """Pass on what became of source items."""
        for root, fate in settled:
            self._settled(root, fate)

    def close(self) -> None:
        """Take nothing more; whoever waits in `put` gets an error. The driver is not woken any more."""
        with self._changed:
            if self.open:
                self.open = False
                self.wake()
                self.wake = lambda: None
            self._changed.notify_all()


def _keys(row: Sequence[Entry], place: int) -> Iterable[Any]:
    for entry in row:
        yield from entry.takers[place][1] or ()
