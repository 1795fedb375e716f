"""Items that the program's own loop reads of an iterator, on their way to the driver: many at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jobq.errors import PayloadError
from jobq.failure import pickling_hint, safe_text
from jobq.inlet import Takers
from jobq.letters import item_in_words, note_item
from jobq.lineage import Fate
from jobq.shapes import SCALARS
from jobq.wire import Block, Codec

#: What was read waits so long at most for company, in seconds; then, too, it is looked for results.
READ_SECONDS = 0.001


class Feed:
    """
    Blocks of items for the stage *name*, of which nobody follows a single one. Implements `inlet.Entrance`.

    The driver's thread takes them and tells the room there is; ``found_room`` is called, in that thread, when
    there is some again for whoever found none. ``error`` is why the items ended, where they didn't by
    themselves: what the iterator raised, or that one can't be pickled.
    """

    def __init__(self, name: str, items: Iterable[Any], codec: Codec, found_room: Callable[[], None]) -> None:
        self.entries = (name,)
        self.read = 0
        self.exhausted = False
        self.error: Exception | None = None
        self.wake: Callable[[], None] = lambda: None
        self._items: Iterator[Any] = iter(items)
        self._codec = codec
        self._found_room = found_room
        self._takers: Takers = ((name, None),)
        self._lock = threading.Lock()
        self._blocks: deque[Block] = deque()
        self._coming = self._coming_bytes = 0
        self._room = self._room_bytes = 0
        self._wanting = False

    # ── for the driver ───────────────────────────────────────────────────────

    @property
    def busy(self) -> bool:
        """Whether something may still come of it."""
        return not self.exhausted or bool(self._blocks)  # in this order

    @property
    def is_empty(self) -> bool:
        """Whether nothing has come."""
        return not self._blocks

    def take(self) -> Iterable[tuple[Takers, Block, None]]:
        """Yield what has come."""
        with self._lock:
            blocks, self._blocks = self._blocks, deque()
            self._coming = self._coming_bytes = 0
        for block in blocks:
            yield self._takers, block, None

    def allow(self, name: str, room: int, room_bytes: int) -> None:  # noqa: ARG002  # there is one stage only
        """Take it that so many items, and bytes, more may come."""
        with self._lock:
            self._room, self._room_bytes = room - self._coming, room_bytes - self._coming_bytes
            found = self._wanting and self._room > 0 and self._room_bytes > 0
            self._wanting = self._wanting and not found
        if found:
            self._found_room()

    def settle(self, settled: Iterable[tuple[int, Fate]]) -> None:
        """Nobody waits for a single item."""

    # ── for the loop ─────────────────────────────────────────────────────────

    def fill(self, waiting: int, most: int, stop: Callable[[], bool]) -> None:
        """
        Read until *most* items wait for their results, beginning with so many; none where there is no room.

        Ends earlier when, after a millisecond, *stop* says so. An item never waits for more company than a
        quarter of what was handed over before it: the next one may be long in coming.
        """
        until = time.monotonic() + READ_SECONDS
        while waiting < most and not self.exhausted and (room := self._find_room()) > 0:
            waiting += self._read_some(min(room, most - waiting, max(1, waiting // 4)))
            if time.monotonic() >= until and stop():
                break

    def drop(self) -> None:
        """Read no more: a generator is closed, if nobody else has it."""
        self.exhausted, self._items = True, iter(())

    def _find_room(self) -> int:
        with self._lock:
            self._wanting = self._room <= 0 or self._room_bytes <= 0
            return 0 if self._wanting else self._room

    def _read_some(self, most: int) -> int:
        """Hand over at most so many items, and no more when a millisecond is over; return how many."""
        clock, before, by_reference = time.monotonic, self.read, self._codec.by_reference
        until = clock() + READ_SECONDS
        pieces: list[Any] = []
        raw = True  # scalars, and what goes by reference, are packed together
        try:
            for item in self._items:
                if raw and not by_reference and type(item) not in SCALARS:
                    self._give(pieces, raw=True)
                    raw, pieces = False, []
                pieces.append(item if raw else self._pickled(item))
                self.read += 1
                if self.read - before >= most or clock() >= until:
                    break
            else:
                self.exhausted = True
        except Exception as error:  # the iterator's, or of an item that can't be pickled
            self.error, self.exhausted = error, True
        self._give(pieces, raw=raw)
        return self.read - before

    def _pickled(self, item: Any) -> Any:
        try:
            return self._codec.encode(item)
        except Exception as error:
            what = f"{type(error).__name__}: {safe_text(error)}{pickling_hint(error)}"
            problem = PayloadError(f"the item for {self.entries[0]}() can't be pickled: {what}")
            note_item(problem, item_in_words(item), index=self.read)
            raise problem from error

    def _give(self, pieces: list[Any], *, raw: bool) -> None:
        """Hand over items as they came."""
        if not pieces:
            return
        block = self._codec.scalars(pieces) if raw else self._codec.block(pieces)
        with self._lock:
            told = bool(self._blocks)
            self._blocks.append(block)
            self._coming += block.count
            self._coming_bytes += block.nbytes
            self._room -= block.count
            self._room_bytes -= block.nbytes
        if not told:
            self.wake()
