"""Where a run's results go: nowhere, into a list, into a file, or to a loop that reads them."""

from __future__ import annotations

import errno
import gc
import math
import os
import select
import selectors
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, Protocol

from jobq.backend import Waitable
from jobq.wire import Block, Codec, PackedObjects, PackedRows, PackedScalars, Undecodable, owned

#: Results that may wait for their reader: a bounded edge like any other.
RESULTS_SIZE = 1000
#: And so many bytes of them, as of what waits before a stage.
RESULTS_BYTES = 64 * 1024 * 1024
#: No wait for a lock by the program lasts longer, in seconds: a signal that comes just before only sets a
#: flag, which is seen when the wait ends.
HEED_SECONDS = 0.5
#: How often the garbage collector looks, at most, while results are loaded, in seconds.
LOOK_SECONDS = 1.0
#: A pipe that is ready for writing takes at least so much without making us wait (POSIX).
PIPE_BUF = select.PIPE_BUF


class Sink(Protocol):
    """Takes results from the driver's thread. ``kind`` is the form in which workers make them."""

    kind: Literal["items", "json", "count"]

    def put(self, stage: str, block: Block) -> None:
        """Take a block of results. Never waits."""
        ...

    @property
    def room(self) -> int:
        """How many more results are welcome."""
        ...

    @property
    def waitable(self) -> Waitable | None:
        """What to wait for before calling `flush`, while something is left to write."""
        ...

    @property
    def broken(self) -> str | None:
        """Why nothing more can be written ("": the reader has gone); None: all is well."""
        ...

    def flush(self) -> None:
        """Write what can be written without waiting."""
        ...


class Discard:
    """Results are counted only."""

    kind: Literal["items", "json", "count"] = "count"
    room = 1 << 40
    waitable: Waitable | None = None
    broken: str | None = None

    def put(self, stage: str, block: Block) -> None:
        """Forget it."""

    def flush(self) -> None:
        """Nothing is left to write."""


class Collect:
    """
    Results are kept in order of arrival: undecoded, until the driver has nothing better to do or is through.

    ``codec`` decodes them; it is known when the backend is made.
    """

    kind: Literal["items", "json", "count"] = "items"
    room = 1 << 40
    waitable: Waitable | None = None
    broken: str | None = None
    codec: Codec

    def __init__(self) -> None:
        self.kept: list[Block | list[Any]] = []  # lists are loaded
        self._stages: list[str] = []  # that gave them
        self._next = 0  # the first that may still be loaded ahead of those before it
        self._seldom = Seldom()
        self.unloadable: list[tuple[str, Undecodable]] = []

    def put(self, stage: str, block: Block) -> None:
        """Keep it."""
        self.kept.append(owned(block))
        self._stages.append(stage)

    def flush(self) -> None:
        """Nothing is left to write."""

    @property
    def behind(self) -> bool:
        """Whether there are results to be loaded that run nobody's code: the driver's thread may do that."""
        kept = self.kept
        while self._next < len(kept):
            if isinstance(kept[self._next], PackedRows | PackedScalars):
                return True
            self._next += 1
        return False

    def catch_up(self) -> None:
        """Load the next of these."""
        self._seldom.begin()
        self.kept[self._next] = self._load(self._stages[self._next], self.kept[self._next])
        self._next += 1
        self._seldom.look()

    @property
    def restless(self) -> bool:
        """Whether something is to be done when no results come for a while, or at the end: `rest`."""
        return self._seldom.is_on

    def rest(self) -> None:
        """Leave everything as it was found. Idempotent."""
        self._seldom.end()

    def load_all(self) -> list[Any]:
        """Return all results, in order. For the caller's thread: to load them may run user code."""
        results: list[Any] = []
        self._seldom.begin()
        try:
            kept = self.kept[::-1]
            self.kept.clear()
            for stage in self._stages:
                results += self._load(stage, kept.pop())  # so that none of it is in memory twice for long
        finally:
            self.rest()
        return results

    def _load(self, stage: str, block: Block | list[Any]) -> list[Any]:
        if isinstance(block, list):
            return block
        before = self.codec.undecoded
        items = self.codec.decode(block)
        if self.codec.undecoded != before:
            self.unloadable += [(stage, item) for item in items if isinstance(item, Undecodable)]
            items = [item for item in items if not isinstance(item, Undecodable)]
        return items


class Seldom:
    """
    Has the garbage collector look seldom, while items are made that all stay.

    By itself it would look at all of them again and again, for nothing: a third of the time of making them.
    It is off from `begin` to `end`, except that `look` gives it a twentieth of the time.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._look_at = math.inf
        self.is_on = False

    def begin(self) -> None:
        """Begin, unless the program has switched the collector off itself. Idempotent."""
        if not self.is_on and gc.isenabled():
            gc.disable()
            self.is_on = True
            self._look_at = self._now() + LOOK_SECONDS

    def look(self) -> None:
        """Have it look now, if it is time to."""
        if self.is_on and (began := self._now()) >= self._look_at:
            gc.collect()
            ended = self._now()
            self._look_at = ended + max(LOOK_SECONDS, 20 * (ended - began))

    def end(self) -> None:
        """Let it do as it likes again. Idempotent."""
        if self.is_on:
            self.is_on = False
            gc.enable()


class Fates(Discard):
    """Results are made, and wait in the fates of the source items that they came of."""

    kind: Literal["items", "json", "count"] = "items"


class JsonLines:
    """
    Results are written to a descriptor as JSON lines, which the workers made.

    *anew*: what is in the file is replaced. Nothing is written any more once it is ``broken``.
    """

    kind: Literal["items", "json", "count"] = "json"

    def __init__(self, fd: int, *, anew: bool = False) -> None:
        self._fd = fd
        self._anew = anew
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self._pending: deque[memoryview] = deque()
        self._items: deque[int] = deque()
        self._waiting = 0
        self._bytes = 0
        self._waitable = Waitable(fd, selectors.EVENT_WRITE)
        self.broken: str | None = None

    def begin(self) -> None:
        """Empty a file that is written anew: from here on the run goes its way."""
        if self._anew and self._regular:
            os.ftruncate(self._fd, 0)

    def put(self, stage: str, block: Block) -> None:  # noqa: ARG002  # all results are alike
        """Write it now as far as the reader takes it, the rest later."""
        if not isinstance(block, PackedObjects) or self.broken is not None:
            return
        self._pending.append(memoryview(block.body))
        self._items.append(block.count)
        self._waiting += block.count
        self._bytes += len(block.body)
        self.flush()

    @property
    def room(self) -> int:
        """How many more results are welcome."""
        return _room_beside(self._waiting, self._bytes)

    @property
    def waitable(self) -> Waitable | None:
        """The descriptor, while something is left to write."""
        return self._waitable if self._pending else None

    def flush(self) -> None:
        """Write what can be written without waiting."""
        try:
            while self._pending:
                if not self._regular and not self._ready():
                    return
                # Shared terminals and pipes must not be made non-blocking: small writes can't block.
                view = self._pending[0]
                size = len(view) if self._regular else PIPE_BUF
                written = os.write(self._fd, view[:size])
                self._bytes -= written
                rest = view[written:]
                if rest:
                    self._pending[0] = rest
                else:
                    self._pending.popleft()
                    self._waiting -= self._items.popleft()
        except OSError as error:
            self.broken = "" if error.errno == errno.EPIPE else error.strerror or str(error)
            self._pending.clear()
            self._items.clear()
            self._waiting = self._bytes = 0

    def _ready(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(0))


def _room_beside(waiting: int, nbytes: int) -> int:
    """Return how many results are welcome besides so many, and bytes, that wait."""
    return RESULTS_SIZE - waiting if nbytes < RESULTS_BYTES else 0


class Stream:
    """
    Results are handed to another thread, which takes them block by block.

    When the reader is slow, `room` shrinks and the driver starts no job that gives results. Whoever asked
    for the room while something waited is woken (`wake`) by the reader's next step.
    """

    kind: Literal["items", "json", "count"] = "items"
    waitable: Waitable | None = None
    broken: str | None = None

    def __init__(self) -> None:
        self._blocks: deque[tuple[str, Block]] = deque()
        self._waiting = 0
        self._bytes = 0
        self._changed = threading.Condition()
        self._ended = False
        self._asked = False
        self._nudged = False
        self.wake: Callable[[], None] = lambda: None

    def put(self, stage: str, block: Block) -> None:
        """Hand it over."""
        with self._changed:
            self._blocks.append((stage, block))
            self._waiting += block.count
            self._bytes += block.nbytes
            self._changed.notify()

    @property
    def room(self) -> int:
        """How many more results are welcome."""
        with self._changed:
            self._asked = self._waiting > 0
            return _room_beside(self._waiting, self._bytes)

    def flush(self) -> None:
        """Nothing is left to write."""

    def end(self) -> None:
        """Say that no more results come, and wake nobody any more."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def nudge(self) -> None:
        """Let whoever waits look again."""
        with self._changed:
            self._nudged = True
            self._changed.notify()

    @property
    def has_some(self) -> bool:
        """Whether there is a block to be had at once."""
        return bool(self._blocks)

    def wait(self) -> bool:
        """Return when there is a block, or at a nudge; False: no more come."""
        with self._changed:
            while not (self._blocks or self._nudged):
                if self._ended:
                    return False
                self._changed.wait(HEED_SECONDS)
            self._nudged = False
        return True

    def poll(self) -> tuple[str, Block] | None:
        """Return the next block, and the stage that gave it, if there is one."""
        with self._changed:
            return self._pop() if self._blocks else None

    def take(self) -> tuple[str, Block] | None:
        """Return the same, waiting for it; None: no more come."""
        while (given := self.poll()) is None and self.wait():
            pass
        return given

    def _pop(self) -> tuple[str, Block]:
        stage, block = self._blocks.popleft()
        self._waiting -= block.count
        self._bytes -= block.nbytes
        if self._asked:
            self._asked = False
            if not self._ended:
                self.wake()
        return stage, block
