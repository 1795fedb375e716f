"""
`Lock` and `Semaphore`: one at a time, or *n*, among all workers and threads of a run.

    Lock.acquire ─── ask ───> Desk, in the driver's thread ── Book: who holds what, who waits
                 <─ granted ─

Whoever grants sees each holder's death itself, so that a lock is never lost with its holder. Where workers
are threads, the book is kept in this process.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

from jobq.backend import Work
from jobq.errors import EndOfChannel, JobqError
from jobq.listener import Contact, Line, Listener, Peer
from jobq.wire import Order

# ── the book ─────────────────────────────────────────────────────────────────


@dataclass(eq=False, slots=True)
class Waiter:
    """Somebody who asked; ``granted`` is called at his turn."""

    key: str
    holder: Hashable
    granted: Callable[[], None]


@dataclass(slots=True)
class Entry:
    """One lock or semaphore: how many may hold it, who does, and who waits, in order."""

    limit: int
    holders: Counter[Hashable] = field(default_factory=Counter)
    waiting: deque[Waiter] = field(default_factory=deque)


class Book:
    """Who holds what. First come, first served; nothing is kept of what nobody holds."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def ask(self, waiter: Waiter, limit: int) -> None:
        """Grant *waiter*'s wish, now or at his turn. Raises `ValueError` if others ask with another limit."""
        entry = self._entries.setdefault(waiter.key, Entry(limit))
        if entry.limit != limit:
            raise ValueError(f"the {waiter.key} is in use with n={entry.limit}; here n={limit}")
        entry.waiting.append(waiter)
        self._pass_on(waiter.key)

    def withdraw(self, waiter: Waiter) -> bool:
        """Let *waiter* wait no longer; return False if he was granted his wish already."""
        entry = self._entries.get(waiter.key)
        if entry is None or waiter not in entry.waiting:
            return False
        entry.waiting.remove(waiter)
        self._pass_on(waiter.key)
        return True

    def release(self, key: str, holder: Hashable) -> None:
        """Take one hold back, and grant it to who is next. Raises `RuntimeError` if it isn't held."""
        entry = self._entries.get(key)
        if entry is None or not entry.holders[holder]:
            raise RuntimeError(f"the {key} is released by a worker that doesn't hold it")
        entry.holders[holder] -= 1
        self._pass_on(key)

    def gone(self, holder: Hashable) -> None:
        """Take back all that *holder* held; his waiters were withdrawn before."""
        for key, entry in list(self._entries.items()):
            if entry.holders.pop(holder, 0):
                self._pass_on(key)

    def _pass_on(self, key: str) -> None:
        entry = self._entries[key]
        while entry.waiting and entry.holders.total() < entry.limit:
            waiter = entry.waiting.popleft()
            entry.holders[waiter.holder] += 1
            waiter.granted()
        if not entry.waiting and not entry.holders.total():
            del self._entries[key]


# ── who keeps it ─────────────────────────────────────────────────────────────

#: What each thread holds: only to tell one that would wait for itself.
Held: TypeAlias = defaultdict[int, Counter[str]]

#: Answers. Who withdraws is told in any case whether he holds it: the two may have crossed.
GRANTED, WITHDRAWN, WITHDRAWN_BUT_HELD = range(3)
ANSWERS = [marshal.dumps(answer) for answer in (GRANTED, WITHDRAWN, WITHDRAWN_BUT_HELD)]


class Desk:
    """Keeps the book for worker processes. The driver waits for ``fd`` and calls `serve`."""

    def __init__(self, address: str) -> None:
        self._book = Book()
        self._waiters: dict[Peer, Waiter] = {}
        self._listener = Listener(address, self._heard, left=self._leave, gone=self._book.gone)
        self.fd = self._listener.fd

    def serve(self) -> None:
        """Deal with all requests that have come. Never waits."""
        self._listener.serve()

    def close(self) -> None:
        """Close every connection. Idempotent."""
        self._listener.close()

    def _heard(self, peer: Peer, request: memoryview) -> None:
        what, key, limit = marshal.loads(request)
        try:
            if what == "ask":
                self._waiters[peer] = waiter = Waiter(key, peer.pid, partial(self._grant, peer))
                self._book.ask(waiter, limit)
            elif what == "release":
                self._book.release(key, peer.pid)
                peer.send(ANSWERS[GRANTED])
            else:
                peer.send(ANSWERS[WITHDRAWN if self._withdraw(peer) else WITHDRAWN_BUT_HELD])
        except (ValueError, RuntimeError) as error:
            self._waiters.pop(peer, None)
            peer.send(marshal.dumps([type(error).__name__, str(error)]))

    def _grant(self, peer: Peer) -> None:
        del self._waiters[peer]
        peer.send(ANSWERS[GRANTED])

    def _leave(self, peer: Peer) -> None:
        self._withdraw(peer)

    def _withdraw(self, peer: Peer) -> bool:
        waiter = self._waiters.pop(peer, None)
        return waiter is not None and self._book.withdraw(waiter)


class ThreadPlace:
    """A run whose workers are threads of this process; keeps the book itself."""

    fd = -1

    def __init__(self, address: str) -> None:
        self._address = address
        self._book = Book()
        self._mutex = threading.Lock()
        self._waiting: set[threading.Event] = set()
        self.pid = os.getpid()
        self.ended = False
        self.held: Held = defaultdict(Counter)
        #: What the keeper of run-scoped resources gives access to.
        self.perform: Callable[..., Any] | None = None
        _threaded[address] = self

    def serve(self) -> None:
        """Do nothing: nobody connects."""

    def close(self) -> None:
        """Let nobody wait any longer. Idempotent."""
        _threaded.pop(self._address, None)
        with self._mutex:
            self.ended = True
            for event in self._waiting:
                event.set()

    def acquire(self, key: str, limit: int, timeout: float | None) -> bool:
        """Return whether it was granted within *timeout* seconds."""
        event = threading.Event()
        waiter = Waiter(key, self, event.set)
        with self._mutex:
            if self.ended:
                raise _ended()
            self._book.ask(waiter, limit)
            self._waiting.add(event)
        try:
            event.wait(timeout)
        except BaseException:
            if not self._withdraw(waiter):
                self.release(key)
            raise
        finally:
            self._waiting.discard(event)
        granted = not self._withdraw(waiter)
        if self.ended and not granted:
            raise _ended()
        return granted

    def release(self, key: str) -> None:
        """Give it back."""
        with self._mutex:
            self._book.release(key, self)

    def _withdraw(self, waiter: Waiter) -> bool:
        with self._mutex:
            return self._book.withdraw(waiter)


class ProcessPlace:
    """A run in whose worker process this is."""

    def __init__(self, address: str) -> None:
        self._desk = Contact(address)
        self.keeper = Contact(keeper_address(address))
        self.pid = os.getpid()
        self.held: Held = defaultdict(Counter)
        self.flush: Callable[[], object] = bool  # nothing

    def acquire(self, key: str, limit: int, timeout: float | None) -> bool:
        """Return whether it was granted within *timeout* seconds."""
        self.flush()
        with self._line() as line:
            line.send(marshal.dumps(("ask", key, limit)))
            try:
                if timeout is None or line.wait(timeout):
                    return _read(line) == GRANTED
            except (ConnectionError, EndOfChannel, ValueError):
                raise
            except BaseException:  # a signal handler's: nobody would know of what is granted from now on
                if self._withdraw(line):
                    self.release(key)
                raise
            return self._withdraw(line)

    def release(self, key: str) -> None:
        """Give it back."""
        with self._line() as line:
            line.send(marshal.dumps(("release", key, 0)))
            _read(line)

    def forget(self) -> None:
        """Close the connections: they are those of the process that this one is a copy of."""
        self._desk.close()
        self.keeper.close()

    @staticmethod
    def _withdraw(line: Line) -> bool:
        """Ask no longer; return whether it was granted meanwhile."""
        line.send(marshal.dumps(("withdraw", "", 0)))
        while (answer := _read(line)) == GRANTED:
            pass
        return answer == WITHDRAWN_BUT_HELD

    @contextlib.contextmanager
    def _line(self) -> Iterator[Line]:
        try:
            with self._desk.line() as line:
                yield line
        except (ConnectionError, EndOfChannel) as error:
            raise _ended() from error


def _read(line: Line) -> int:
    answer: int | list[str] = marshal.loads(line.receive())
    if isinstance(answer, int):
        return answer
    kind, text = answer
    raise (ValueError if kind == "ValueError" else RuntimeError)(text)


def _ended() -> JobqError:
    return JobqError("locks and run-scoped resources can't be had: the run has ended, or can't be reached")


def keeper_address(address: str) -> str:
    """Return where the keeper of run-scoped resources listens."""
    return f"{address}/keeper"


# ── where we are ─────────────────────────────────────────────────────────────

#: The run in whose job this thread or task is, by address.
_current: ContextVar[str] = ContextVar("place", default="")
#: Runs whose workers are threads of this process.
_threaded: dict[str, ThreadPlace] = {}
#: Runs in whose worker process this is. One, and after a fork its copy, which asks in its own name.
_joined: dict[str, ProcessPlace] = {}


def open_desk(address: str, *, threads: bool) -> Desk | ThreadPlace | None:
    """Return who keeps the locks of a run; None where the system can't: asking says so then."""
    if threads:
        return ThreadPlace(address)
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError):
        return Desk(address)
    return None


@contextlib.contextmanager
def inside(address: str) -> Iterator[None]:
    """Code in the ``with`` is part of the run at *address*."""
    token = _current.set(address)
    try:
        yield
    finally:
        _current.reset(token)


def join(address: str) -> None:
    """Make a worker process part of the run at *address*; where workers are threads, do nothing."""
    if address not in _threaded:
        _joined.clear()  # if this process was forked in another run, that is not ours
        _joined[address] = ProcessPlace(address)
        _current.set(address)


def joined(work: Work, address: str, flush: Callable[[], object]) -> Work:
    """
    Return *work*, so that it is part of the run at *address* in whichever thread it is called.

    *flush* sends what its finished jobs gave. A process does that before a job takes a lock or touches what
    is shared: if it dies then, the jobs before it have counted, and what they did to others' data isn't
    done twice.
    """
    if address in _threaded:
        return _Inside(work, address)
    _joined[address].flush = flush
    return work


class _Inside:
    """Work that borrows threads which may work for other runs, too."""

    def __init__(self, work: Work, address: str) -> None:
        self._work = work
        self._address = address

    def run(self, order: Order) -> None:
        token = _current.set(self._address)
        try:
            self._work.run(order)
        finally:
            _current.reset(token)

    def close(self) -> None:
        with inside(self._address):
            self._work.close()


def here(what: str) -> ThreadPlace | ProcessPlace:
    """Return the run that this code is part of. Raises `JobqError` if there is none."""
    address = _current.get()
    if not address:  # a thread that a job has started: plain where there is one run only
        known = [*(one for one, place in _threaded.items() if place.pid == os.getpid()), *_joined]
        address = known[0] if len(known) == 1 else ""
    threaded = _threaded.get(address)
    if threaded is not None and threaded.pid == os.getpid():
        return threaded
    place = _joined.get(address)
    if place is not None and place.pid != os.getpid():  # a copy: connections are the original's
        place.forget()
        place = _joined[address] = ProcessPlace(address)
    if place is None:
        raise JobqError(
            f"{what} can be used only while a pipeline runs, and only by its jobs, producers and resources."
        )
    return place


# ── what users see ───────────────────────────────────────────────────────────


class Semaphore:
    """
    A context manager that lets at most *n* of a run's workers and threads in at once, by *name*.

    Given back by leaving the ``with`` (or `release`), or by the death of the worker, even if it leaves
    children; not by the end of the job. Granted in the order of asking.
    """

    _kind = "semaphore"

    def __init__(self, name: str, n: int) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"a {self._kind}'s name is a text that is not empty; got {name!r}")
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"{self._kind} {name!r}: n is a whole number from 1 on; got {n!r}")
        self.name = name
        self.n = n

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def _key(self) -> str:
        return f"{self._kind} {self.name!r}"

    def acquire(self, timeout: float | None = None) -> bool:
        """
        Return True when it is granted, False if it isn't within *timeout* seconds.

        Raises `JobqError` outside a run, and `RuntimeError` where waiting could never end: this thread
        holds it already.
        """
        place = here(repr(self))
        mine = place.held[threading.get_ident()]
        if timeout is None and mine[self._key] >= self.n:
            raise RuntimeError(
                f"{self!r}: this thread holds it, and would wait for itself (coroutines: async with)"
            )
        if not place.acquire(self._key, self.n, timeout):
            return False
        mine[self._key] += 1
        return True

    def release(self) -> None:
        """Give it back. Raises `RuntimeError` if this worker doesn't hold it."""
        place = here(repr(self))
        place.release(self._key)
        mine = place.held[threading.get_ident()]
        for owner in (mine, *list(place.held.values())):  # another thread may have taken it
            if owner[self._key]:
                owner[self._key] -= 1
                break

    def __enter__(self) -> Semaphore:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    async def __aenter__(self) -> Semaphore:
        """Return when it is granted; other coroutines go on meanwhile, which one of them may hold it."""
        import asyncio

        place, loop = here(repr(self)), asyncio.get_running_loop()
        taken: asyncio.Future[None] = loop.create_future()

        def tell(error: BaseException | None) -> None:
            if error is not None and not taken.done():
                taken.set_exception(error)
            elif not taken.done():
                taken.set_result(None)
            elif error is None:
                place.release(self._key)

        def wait() -> None:
            error = None
            try:
                place.acquire(self._key, self.n, None)
            except BaseException as raised:  # raised again where it is awaited
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed, and so is the run
                loop.call_soon_threadsafe(tell, error)

        threading.Thread(target=wait, name="jobq-lock", daemon=True).start()
        try:
            await taken
        except asyncio.CancelledError:
            if taken.done() and not taken.cancelled() and taken.exception() is None:
                place.release(self._key)  # granted, and cancelled before we could go on
            raise
        place.held[threading.get_ident()][self._key] += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()


class Lock(Semaphore):
    """A context manager that lets one of a run's workers and threads in at a time, by *name*."""

    _kind = "lock"

    def __init__(self, name: str) -> None:
        super().__init__(name, 1)
