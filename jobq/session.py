"""
`Pipeline.open`: a run that the program feeds item by item, and whose results it waits for.

    submit ─> Inlet ─> driver (its own thread) ─> workers ─> … ─> Fate ─> Future
                                                                        └─> callbacks, in a thread of theirs

The driver's thread runs no callbacks and decodes no results: a `JobFuture` decodes in the thread that asks.
On `inline` there is no thread at all: whoever waits drives.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any, TypeVar, cast

from jobq.errors import JobqError, JoinTimeout, PayloadError
from jobq.inlet import Entry, Inlet
from jobq.letters import cannot_be_loaded, rebuild
from jobq.lineage import Fate
from jobq.validation import Validator
from jobq.wire import Undecodable
from jobq.work import key_of

if TYPE_CHECKING:
    from jobq.graph import Graph, Node
    from jobq.report import Report, StageCounts
    from jobq.running import Running

T = TypeVar("T")

#: `Session.map` reads so many items ahead of the result that is asked for.
READ_AHEAD = 1000


class JobFuture(Future[Any]):
    """
    The future of one submitted item: the result that settled last of all its descendants.

    ``result()`` is None if there is none, and raises the first dead descendant's exception if there is one.
    """

    def __init__(self, session: Session, root: int) -> None:
        super().__init__()
        self._session = session
        self._root = root
        self._decoded: list[Any] = []

    def cancel(self) -> bool:
        """Cancel the job if it has not begun; return whether it is cancelled."""
        if not self.done():
            self._session.withdraw(self._root)
        return self.cancelled()

    def result(self, timeout: float | None = None) -> Any:
        """Return the result, waiting for it; raises `TimeoutError` after *timeout* seconds."""
        fate: Fate = self._fate(timeout)
        if fate.failure is not None:
            raise rebuild(*fate.failure)
        if fate.result is None:
            return None
        if not self._decoded:
            self._decoded = self._session.decode(fate)
        item = self._decoded[0]
        if isinstance(item, Undecodable):
            raise cannot_be_loaded(item)
        return item

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the job raised, waiting for its end; None if it raised nothing."""
        fate: Fate = self._fate(timeout)
        return rebuild(*fate.failure) if fate.failure is not None else None

    def _fate(self, timeout: float | None) -> Fate:
        if not self.done():
            self._session.wait_for(self, timeout)
        fate: Fate = super().result(timeout)
        return fate

    def settle(self, fate: Fate) -> None:
        """Take *fate* as final (the driver's thread)."""
        if fate.cancelled and fate.failure is None:
            super().cancel()
        elif not self.cancelled():
            self.set_result(fate)

    def _invoke_callbacks(self) -> None:
        # Called in the driver's thread, which runs no user code.
        if self._done_callbacks:  # type: ignore[attr-defined]  # Future's own
            self._session.call_back(super()._invoke_callbacks)  # type: ignore[misc]


class Session:
    """A run in progress that takes items from any thread. A context manager: at its end join, then close."""

    def __init__(
        self, start: Callable[[Callable[..., Inlet]], Running], cleanup: contextlib.ExitStack
    ) -> None:
        self._cleanup = cleanup
        self._roots = itertools.count()
        self._futures: dict[int, JobFuture] = {}
        self._changed = threading.Condition()
        self._ended = False
        self._crash: BaseException | None = None
        self._callbacks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._caller: threading.Thread | None = None
        self.report: Report | None = None
        self._running = running = start(self._make_inlet)
        assert running.driver.inlet is not None
        self._inlet = running.driver.inlet
        self._inlet.wake = running.driver.wake
        self._doors = [_Door(running.graph, node) for node in _doors(running.graph)]
        self._thread: threading.Thread | None = None
        if running.backend.own_thread:
            self._thread = threading.Thread(target=self._drive, name="jobq-driver", daemon=True)
            self._thread.start()
        else:
            self._inlet.pump = self._step
            running.driver.begin()

    def _make_inlet(self, graph: Graph, codec: Any) -> Inlet:
        entries = dict.fromkeys(name for node in _doors(graph) for name in _Door(graph, node).names)
        return Inlet(tuple(entries), codec, self._settled)

    # ── feed ─────────────────────────────────────────────────────────────────

    def submit(self, item: Any) -> JobFuture:
        """
        Return a future for *item*, which enters the pipeline as if a producer had given it.

        Waits while the stage that takes it is full. Raises `PayloadError` if no stage takes it, or if it
        can't be pickled; `JobqError` if the run has ended.
        """
        takers = next((takers for door in self._doors if (takers := door.takers(item))), None)
        if takers is None:
            raise PayloadError(f"no stage takes a {type(item).__qualname__}: {_spelled(self._doors)}")
        try:
            piece = self._running.backend.codec.encode(item)
        except Exception as error:
            raise PayloadError(f"the item can't be pickled: {type(error).__name__}: {error}") from error
        future = JobFuture(self, next(self._roots))
        with self._changed:
            self._futures[future._root] = future
        try:
            self._inlet.put(Entry(takers, piece, future._root))
        except BaseException:
            with self._changed:
                self._futures.pop(future._root, None)
            raise
        return future

    def map(self, items: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield the result of each of *items*, in order; reads ahead of what is asked for, within bounds."""
        ahead: deque[JobFuture] = deque()
        source = iter(items)
        try:
            while True:
                if len(ahead) <= READ_AHEAD // 2:  # by halves, so that items travel together
                    fresh = itertools.islice(source, READ_AHEAD - len(ahead))
                    ahead.extend(self.submit(item) for item in fresh)
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def map_unordered(self, items: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield the results of *items* as they come; reads ahead as `map` does."""
        done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        waiting: set[JobFuture] = set()
        source = iter(items)
        try:
            while True:
                room = READ_AHEAD - len(waiting)
                for item in itertools.islice(source, room if room >= READ_AHEAD // 2 else 0):
                    future = self.submit(item)
                    waiting.add(future)
                    future.add_done_callback(done.put)
                if not waiting:
                    return
                while self._thread is None and done.empty():
                    self._step()
                future = cast("JobFuture", done.get())
                waiting.discard(future)
                yield future.result()
        finally:
            for future in waiting:
                future.cancel()

    # ── wait, steer ──────────────────────────────────────────────────────────

    def join(self, timeout: float | None = None) -> None:
        """Return when all that was submitted so far is settled; raises `JoinTimeout` after *timeout* s."""
        with self._changed:
            waited_for = list(self._futures.values())
        deadline = None if timeout is None else time.monotonic() + timeout
        for future in waited_for:
            rest = None if deadline is None else deadline - time.monotonic()
            try:
                self.wait_for(future, rest)
            except FutureTimeout:
                left = sum(not one.done() for one in waited_for)
                raise JoinTimeout(f"{left} items are not settled after {timeout} s") from None

    def pause(self) -> None:
        """Begin no new job until `resume`; those in hand go on."""
        self._in_driver(self._running.driver.pause)

    def resume(self) -> None:
        """Begin jobs again."""
        self._in_driver(self._running.driver.resume)

    def stats(self) -> dict[str, StageCounts]:
        """Return every stage's counts at one moment, with ``queued``, ``in_flight`` and ``workers``."""
        return self._in_driver(self._running.driver.counts)

    def stop(self) -> None:
        """Stop now: jobs in flight and queued are cancelled. Idempotent."""
        if self.report is None:
            self._inlet.close()
            with self._changed:
                if not self._ended:
                    self._running.driver.abandon()
            self._finish()

    def close(self) -> None:
        """Finish what was submitted, then end the workers. Idempotent."""
        if self.report is None:
            self._inlet.close()
            self._finish()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with contextlib.suppress(JobqError):
                self.resume()
            self.close()
        else:
            self.stop()

    # ── behind the scenes ────────────────────────────────────────────────────

    def _drive(self) -> None:
        try:
            self._running.driver.run()
        except BaseException as error:  # a bug in jobq: whoever waits must hear of it
            self._crash = error
        finally:
            self._end()

    def _end(self) -> None:
        """Let nobody wait any longer."""
        self._inlet.close()
        with self._changed:
            self._ended = True
            left = list(self._futures.values())
            self._futures.clear()
            self._changed.notify_all()
        for future in left:
            future.settle(Fate(cancelled=True))

    def _step(self) -> None:
        """Drive one step, where there is no thread that does."""
        if self._ended:
            raise JobqError("this run has ended")
        if self._running.driver.step():
            self._end()

    def _finish(self) -> None:
        if self._thread is not None:
            self._thread.join()
        else:
            while not self._ended:
                self._step()
            self._running.driver.release()
        self._running.driver.close()
        if self._caller is not None:
            self._callbacks.put(None)
            if self._caller is not threading.current_thread():
                self._caller.join()
        self._cleanup.close()
        if self._crash is not None:
            raise self._crash
        self.report = self._running.conclude().report

    def _settled(self, root: int, fate: Fate) -> None:
        with self._changed:
            future = self._futures.pop(root, None)
        if future is not None:
            future.settle(fate)

    def wait_for(self, future: JobFuture, timeout: float | None) -> None:
        """Return when *future* is done; raises `concurrent.futures.TimeoutError`."""
        if self._thread is not None:
            with contextlib.suppress(CancelledError):
                Future.result(future, timeout)
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        while not future.done():
            if deadline is not None and time.monotonic() >= deadline:
                raise FutureTimeout
            self._step()

    def withdraw(self, root: int) -> None:
        """Cancel an item whose job has not begun."""
        with contextlib.suppress(JobqError):
            self._in_driver(lambda: self._running.driver.withdraw(root))

    def decode(self, fate: Fate) -> list[Any]:
        """Return the items of a fate's result."""
        assert fate.result is not None
        return self._running.backend.codec.decode(fate.result)

    def call_back(self, function: Callable[[], None]) -> None:
        """Have *function* called in the thread for callbacks."""
        if self._thread is None:
            function()
            return
        with self._changed:
            if self._caller is None:
                self._caller = threading.Thread(target=self._call_all, name="jobq-callbacks", daemon=True)
                self._caller.start()
        self._callbacks.put(function)

    def _call_all(self) -> None:
        while (function := self._callbacks.get()) is not None:
            function()

    def _in_driver(self, function: Callable[[], T]) -> T:
        """Return what *function* returns in the driver's thread."""
        if self._thread is None:
            return function()
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:  # told to whoever asked
                answer.set_exception(error)

        with self._changed:
            if self._ended:
                raise JobqError("this run has ended")
            self._running.driver.call(ask)
        while True:
            try:
                return answer.result(timeout=0.5)
            except FutureTimeout:
                if self._ended and not answer.done():
                    raise JobqError("this run has ended") from None


class _Door:
    """One way in: items of a type, and the stages that take them together."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self._nodes = [node]
        if node.stage.kind == "producer":
            taken = dict.fromkeys(name for route in node.routes for name in route.takers)
            self._nodes = [graph.nodes[name] for name in taken]
        self._checks = [Validator(one.signature.item_type) for one in self._nodes]

    @property
    def names(self) -> list[str]:
        """The stages behind this door."""
        return [node.stage.name for node in self._nodes]

    @property
    def types(self) -> list[Any]:
        """What they take."""
        return [node.signature.item_type for node in self._nodes]

    def takers(self, item: Any) -> Any:
        """Return those that take *item*, with its keys; none if it doesn't fit here."""
        return tuple(
            (
                node.stage.name,
                None if node.stage.consumer.key is None else (key_of(node.stage.consumer.key, item),),
            )
            for node, check in zip(self._nodes, self._checks, strict=True)
            if not check.check([item])
        )


def _doors(graph: Graph) -> list[Node]:
    """Return the ways in: what producers give, else each consumer without ``source=``, in order."""
    producers = graph.producers()
    return producers or [node for node in graph.consumers() if not node.stage.source]


def _spelled(doors: Iterable[_Door]) -> str:
    from jobq.annotations import spell

    taken = [
        f"{name}() takes {spell(kind)}"
        for door in doors
        for name, kind in zip(door.names, door.types, strict=True)
    ]
    return "; ".join(dict.fromkeys(taken)) or "nothing takes items"
