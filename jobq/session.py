"""
`Pipeline.open`: a run that the program feeds item by item, and whose results it waits for.

    submit ─> Inlet ─> driver (its own thread) ─> workers ─> … ─> Fate ─> Future
                                                                        └─> callbacks, in a thread of theirs

The driver's thread runs no callbacks and decodes no results: a `JobFuture` decodes in the thread that asks.
On `inline` there is no thread at all: whoever waits drives, one at a time, and then calls the callbacks.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from jobq.annotations import spell
from jobq.errors import Interrupted, JobqError, JobsLost, JoinTimeout, PayloadError, RunFailed
from jobq.inlet import Entry, Inlet, Takers
from jobq.ladder import Ladder, hand_on
from jobq.letters import cannot_be_loaded, item_in_words, note_item, rebuild
from jobq.lineage import Fate
from jobq.report import counted
from jobq.results import HEED_SECONDS
from jobq.validation import Router, Validator
from jobq.wire import Undecodable, owned
from jobq.work import key_of

if TYPE_CHECKING:
    from jobq.graph import Graph, Node
    from jobq.report import Report, StageCounts
    from jobq.running import Running

T = TypeVar("T")

#: `Session.map` reads so many items ahead of the result that is asked for.
READ_AHEAD = 1000
#: While a result is there to be given, items are read ahead for so many seconds only.
READ_SECONDS = 0.001
#: How often an event loop looks after a run that has no thread of its own, in seconds.
ATTEND_SECONDS = 0.001


class JobFuture(Future[Any]):
    """
    The future of one submitted item: the result that settled last of all its descendants.

    ``result()`` is None if there is none, and raises the first dead descendant's exception if there is one.
    """

    _waiters: list[Any]
    _index: int | None = None  # the item's, in what was mapped

    def __init__(self, session: Session, root: int) -> None:
        super().__init__()
        self._session = session
        self._root = root
        self._decoded: list[Any] = []
        self._problem: JobqError | None = None
        if not session.has_thread:
            self._waiters = _Waiters(session)

    def cancel(self) -> bool:
        """Cancel the job if it has not begun; return whether it is cancelled."""
        if not super().done():
            self._session.withdraw([self._root])
        return self.cancelled()

    def done(self) -> bool:
        """Whether the future is settled or cancelled; where nobody else drives, asking does."""
        if not super().done():
            self._session.look()
        return super().done()

    def result(self, timeout: float | None = None) -> Any:
        """Return the result, waiting for it; raises `TimeoutError` after *timeout* seconds."""
        error = self.exception(timeout)
        if error is None:
            return self._decoded[0]
        try:
            raise error
        finally:
            del error  # which holds this frame, which holds it

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the job raised, waiting for its end; None if it raised nothing."""
        if not super().done():
            self._session.wait_for(self, timeout)
        fate: Fate = super().result(0)
        if self._problem is not None:
            return self._problem
        if fate.failure is not None:
            return rebuild(*fate.failure, index=self._index)
        if not self._decoded:
            self._decoded = self._session.decode(fate)
        item = self._decoded[0]
        return cannot_be_loaded(item) if isinstance(item, Undecodable) else None

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Have *fn* called with this future when it is done: at once if it is."""
        super().add_done_callback(fn)
        if not super().done():
            self._session.attend()

    def settle(self, fate: Fate, problem: JobqError | None = None) -> None:
        """Take *fate* as final; *problem* is why it is cancelled, where that was nobody's wish."""
        if super().done():
            return
        if fate.cancelled and fate.failure is None and problem is None:
            super().cancel()
            self.set_running_or_notify_cancel()  # tells those who wait for several futures
        else:
            self._problem = problem if fate.cancelled and fate.failure is None else None
            self.set_result(fate)

    def _invoke_callbacks(self) -> None:
        # Called in the driver's thread, which runs no user code.
        if self._done_callbacks:  # type: ignore[attr-defined]  # Future's own
            self._session.call_back(super()._invoke_callbacks)  # type: ignore[misc]

    def __repr__(self) -> str:
        if not super().done():
            state = "pending"
        elif self.cancelled():
            state = "cancelled"
        else:
            fate: Fate = super().result(0)
            state = "done" if fate.failure is None and self._problem is None else "failed"
        return f"<{type(self).__name__} {state}>"

    @property
    def watched(self) -> bool:
        """Whether somebody is to be called back."""
        return bool(self._done_callbacks)  # type: ignore[attr-defined]


class _Waiters(list[Any]):
    """Those of `concurrent.futures.wait` and `as_completed`: where nobody else drives, their waiting does."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def append(self, waiter: Any) -> None:
        if not isinstance(waiter.event, _DrivingEvent):
            waiter.event = _DrivingEvent()
        waiter.event.sessions.add(self._session)
        super().append(waiter)


class _DrivingEvent(threading.Event):
    """An event whose `wait` drives."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: set[Session] = set()

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            if len(self.sessions) == 1:
                next(iter(self.sessions)).drive_until(self.is_set, deadline)
            else:
                for session in self.sessions:
                    session.look()
                super().wait(ATTEND_SECONDS)
        return True


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
        self._finishing = threading.Lock()
        self._finished = False
        self._crash: BaseException | None = None
        self._callbacks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._calling = 0  # callbacks that were not through when somebody last looked
        self._caller: threading.Thread | None = None
        self._turn = _Turn()
        self._attending: object = None
        self.report: Report | None = None
        self._running = running = start(self._make_inlet)
        self._thread: threading.Thread | None = None
        self.has_thread = running.backend.own_thread
        try:
            self._begin()
        except BaseException:
            running.driver.release()
            running.driver.close()
            raise

    def _begin(self) -> None:
        driver = self._running.driver
        assert isinstance(driver.inlet, Inlet)
        self._inlet = driver.inlet
        self._inlet.wake = driver.wake
        self._doors = [_Door(self._running.graph, node) for node in _doors(self._running.graph)]
        if self.has_thread:
            self._thread = self._running.start_thread(self._drive)
        else:
            self._inlet.pump = lambda until: self._step(until=until)
            driver.begin()

    def _make_inlet(self, graph: Graph, codec: Any) -> Inlet:
        entries = dict.fromkeys(name for node in _doors(graph) for name in _takers(node))
        return Inlet(tuple(entries), codec, self._settled)

    # ── feed ─────────────────────────────────────────────────────────────────

    def submit(self, item: Any) -> JobFuture:
        """
        Return a future for *item*, which enters the pipeline as if a producer had given it.

        Waits while the stage that takes it is full. Raises `PayloadError` if no stage takes it, or if it
        can't be pickled; `JobqError` if the run has ended.
        """
        takers = self._takers(item)
        try:
            piece = self._running.backend.codec.encode(item)
        except Exception as error:
            raise PayloadError(
                f"the item for {takers[0][0]}() can't be pickled: {type(error).__name__}: {error}"
            ) from error
        future = JobFuture(self, next(self._roots))
        with self._changed:
            self._futures[future._root] = future
        try:
            self._inlet.put(Entry(takers, piece, future._root))
        except BaseException:
            self._settled(future._root, Fate(cancelled=True))
            raise
        return future

    def _submit_at(self, index: int, item: Any) -> JobFuture:
        try:
            future = self.submit(item)
        except PayloadError as error:
            note_item(error, item_in_words(item), index=index)
            raise
        future._index = index
        return future

    def _takers(self, item: Any) -> Takers:
        for door in self._doors:
            if takers := door.takers(item):
                return takers
        for door in self._doors:
            if takers := door.unchecked(item):
                return takers
        reasons = dict.fromkeys(reason for door in self._doors for reason in door.reasons(item))
        raise PayloadError(
            f"no stage takes this {type(item).__qualname__}: "
            + ("; ".join(reasons) or "there is none that takes items from outside")
        )

    def map(self, items: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield the result of each of *items*, in order; reads ahead of what is asked for, within bounds."""
        ahead: deque[JobFuture | PayloadError] = deque()
        source, indices = _Source(items), itertools.count()

        def there() -> bool:
            return isinstance(ahead[0], PayloadError) or ahead[0].done()

        try:
            while True:
                for item in self._ahead(source, lambda: len(ahead), there):
                    try:
                        ahead.append(self._submit_at(next(indices), item))
                    except PayloadError as error:
                        ahead.append(error)  # raised at its turn, like any other
                if not ahead:
                    source.end()
                    return
                head = ahead.popleft()
                if isinstance(head, PayloadError):
                    raise head
                yield head.result()
        finally:
            self.withdraw([future._root for future in ahead if isinstance(future, JobFuture)])

    @staticmethod
    def _ahead(source: Iterator[Any], waiting: Callable[[], int], there: Callable[[], bool]) -> Iterator[Any]:
        """
        Yield as many items as should be read now.

        Once a result is *there*, whoever asks must not wait for items that are slow to come.
        """
        began = time.monotonic()
        while (count := waiting()) < READ_AHEAD:
            if count and time.monotonic() - began >= READ_SECONDS and there():
                return
            try:
                item = next(source)
            except StopIteration:
                return
            yield item

    # ── wait, steer ──────────────────────────────────────────────────────────

    def join(self, timeout: float | None = None) -> None:
        """
        Return when all that was submitted so far is settled; raises `JoinTimeout` after *timeout* s.

        Meanwhile a stop signal lets what is queued and in flight finish, a second one cancels it: then this
        raises `KeyboardInterrupt`.
        """
        with self._on_a_ladder():
            self._join(timeout)

    def _join(self, timeout: float | None) -> None:
        with self._changed:
            waited_for = list(self._futures.values())
        deadline = None if timeout is None else time.monotonic() + timeout
        for future in waited_for:
            rest = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                self.wait_for(future, rest)
            except FutureTimeout:
                left = sum(not Future.done(one) for one in waited_for)
                verb = "is" if left == 1 else "are"
                raise JoinTimeout(f"{counted(left, 'item')} {verb} not settled after {timeout} s") from None

    def pause(self) -> None:
        """Begin no new job until `resume`; those in hand go on."""
        self._in_driver(self._running.driver.pause)

    def resume(self) -> None:
        """Begin jobs again."""
        self._in_driver(self._running.driver.resume)

    def stats(self) -> dict[str, StageCounts]:
        """Return every stage's counts at one moment, with ``queued``, ``in_flight`` and ``workers``."""
        if self.report is not None:
            return self.report.stages
        return self._in_driver(self._running.driver.stats)

    def stop(self) -> None:
        """Stop now: jobs in flight and queued are cancelled. Idempotent."""
        try:
            self._abandon()
            self._finish()
        except KeyboardInterrupt:  # somebody does not come to an end, and is not to be waited for
            self._abandon()
            with self._changed:
                for _ in range(0 if self._ended else 2):  # past FINISH, whatever it has heard yet
                    self._running.driver.request_stop()
            self._finish()
            raise

    def close(self) -> None:
        """
        Finish what was submitted, also by callbacks until then; end the workers. Idempotent.

        Stop signals are heard as in `join`. Raises `RunFailed` if the run gave up.
        """
        with self._on_a_ladder():
            with contextlib.suppress(JobqError):
                self.resume()
            self._let_callbacks_submit()
            self._inlet.close()
            with contextlib.suppress(JobqError):
                self._in_driver(self._no_more_comes)
            self._finish()
        gave_up = self._running.driver.ending.gave_up
        if gave_up is not None:
            raise RunFailed(gave_up, self.report)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.stop()
            return
        try:
            self.close()
        except BaseException:  # Ctrl-C while we wait: nothing may be left
            self.stop()
            raise

    # ── behind the scenes ────────────────────────────────────────────────────

    @contextlib.contextmanager
    def _on_a_ladder(self) -> Iterator[None]:
        """
        Have the run itself hear stop signals inside the ``with``, and the program only then.

        Where no thread drives, jobs run in this one: there Ctrl-C strikes at once.
        """
        if not self.has_thread or self._finished:
            yield
            return
        heard: list[int] = []

        def climb(number: int) -> bool:
            heard.append(number)
            with self._changed:
                if not self._ended:
                    self._running.driver.request_stop(number)
            return False

        with Ladder() as ladder:
            ladder.lead(climb)
            yield
        if heard:
            hand_on(heard[0], self.report, unfinished=len(heard) > 1)

    def _abandon(self) -> None:
        self._inlet.close()
        with self._changed:
            if not self._ended:
                self._running.driver.abandon()

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
            self._changed.notify_all()
            left = list(self._futures)
        for root in left:
            self._settled(root, Fate(cancelled=True))

    def _no_more_comes(self) -> None:
        self._running.driver.scheduler.fed = False  # a batch need not wait to be filled

    def _let_callbacks_submit(self) -> None:
        """Return when there is no callback left that could submit something."""
        if threading.current_thread() is self._caller:
            return
        while True:
            with self._changed:
                watched = [future for future in self._futures.values() if future.watched]
                if not watched and not self._calling:
                    return
            for future in watched:
                self.wait_for(future, None)
            with self._changed:
                while self._calling:
                    self._changed.wait(HEED_SECONDS)

    def _finish(self) -> None:
        if self._thread is not None:
            with self._changed:  # up to 3.12 a `join` that Ctrl-C ends takes the thread for ended
                while not self._ended:
                    self._changed.wait(HEED_SECONDS)
            self._thread.join()
        else:
            self.drive_until(lambda: self._ended, None)
        with self._finishing:
            if not self._finished:
                self._finished = True
                self._conclude()
        if self._caller is not None and self._caller is not threading.current_thread():
            self._caller.join()
        if self._crash is not None:
            raise self._crash

    def _conclude(self) -> None:
        try:
            if not self.has_thread:
                self._running.driver.release()
            if self._crash is None:
                outcome = self._running.conclude()
                self.report = outcome.report
                if outcome.unbalanced is not None:
                    raise JobsLost(
                        f"the books don't balance, a bug in jobq: {outcome.unbalanced}", outcome.report
                    )
        finally:
            self._running.driver.close()
            self._callbacks.put(None)
            self._cleanup.close()

    def _settled(self, root: int, fate: Fate) -> None:
        future = self._futures.get(root)
        if future is None:
            return
        if fate.result is not None:
            fate.result = owned(fate.result)  # a future may be kept for ever
        if fate.failure is not None:
            failure, stage, part = fate.failure
            if part is not None:
                part = replace(part, block=owned(part.block))
            fate.failure = failure, stage, part
        future.settle(fate, self._why_it_ended() if fate.cancelled else None)
        with self._changed:  # after its callbacks are counted: `close` waits for either
            self._futures.pop(root, None)

    def _why_it_ended(self) -> JobqError | None:
        gave_up = self._running.driver.ending.gave_up
        if self._crash is not None:
            gave_up = f"a bug in jobq: {type(self._crash).__name__}: {self._crash}"
        return RunFailed(gave_up) if gave_up is not None else None

    def wait_for(self, future: JobFuture, timeout: float | None) -> None:
        """Return when *future* is done; raises `concurrent.futures.TimeoutError`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.has_thread:
            while True:
                rest = HEED_SECONDS if deadline is None else deadline - time.monotonic()
                try:
                    Future.result(future, max(0.0, min(rest, HEED_SECONDS)))
                except FutureTimeout:
                    if deadline is not None and time.monotonic() >= deadline and not Future.done(future):
                        raise
                except CancelledError:
                    return
                else:
                    return
        self.drive_until(lambda: Future.done(future), deadline)
        if not Future.done(future):
            raise FutureTimeout

    def withdraw(self, roots: Iterable[int]) -> None:
        """Cancel those of *roots* of which no job has begun."""

        def withdraw() -> None:
            for root in roots:
                if root in self._futures:
                    self._running.driver.withdraw(root)

        with contextlib.suppress(JobqError):
            self._in_driver(withdraw)

    def decode(self, fate: Fate) -> list[Any]:
        """Return the items of a fate's result: one, or None."""
        return [None] if fate.result is None else self._running.backend.codec.decode(fate.result)

    # ── callbacks ────────────────────────────────────────────────────────────

    def call_back(self, function: Callable[[], None]) -> None:
        """Have *function* called, but not by the driver."""
        with self._changed:
            self._calling += 1
            if self.has_thread and self._caller is None:
                self._caller = threading.Thread(target=self._call_all, name="jobq-callbacks", daemon=True)
                self._caller.start()
        self._callbacks.put(function)

    def _call_all(self) -> None:
        while (function := self._callbacks.get()) is not None:
            try:
                self._call(function)
            except BaseException:  # of a callback: the others are called all the same
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    def _call(self, function: Callable[[], None]) -> None:
        try:
            function()
        finally:
            with self._changed:
                self._calling -= 1
                self._changed.notify_all()

    def _call_here(self) -> None:
        """Call what is to be called back in this thread, where there is no thread for it."""
        while not self.has_thread:
            try:
                function = self._callbacks.get_nowait()
            except queue.Empty:
                return
            if function is not None:
                self._call(function)

    # ── in the driver's place, or its thread ─────────────────────────────────

    def _wake(self) -> None:
        with self._changed:
            if not self._ended:
                self._running.driver.wake()

    def _step(self, deadline: float | None = None, until: Callable[[], bool] = lambda: False) -> None:
        """Drive one step, where there is no thread that does; none if others did what *until* waits for."""
        with self._turn.take(self._wake, deadline) as mine:
            if not mine or until():
                return
            if self._ended:
                raise JobqError("this run has ended")
            try:
                with self._ctrl_c_first():
                    ended = self._running.driver.step()
            except Exception as error:  # a bug in jobq
                self._crash, ended = error, True
            if ended:
                self._end()
        self._call_here()

    @contextlib.contextmanager
    def _ctrl_c_first(self) -> Iterator[None]:
        """Let Ctrl-C through a job that runs in this very thread: it would count as the job's failure."""
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(before):
            yield
            return
        struck = False

        def strike(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # the handler's form
            nonlocal struck
            struck = True
            if self._running.backend.at_work:
                raise Interrupted

        signal.signal(signal.SIGINT, strike)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if struck:
            before(signal.SIGINT, None)

    def drive_until(self, claim: Callable[[], bool], deadline: float | None) -> None:
        """Where there is no thread that drives, do so until *claim* is true, or the *deadline* is past."""
        if self.has_thread or claim():
            return
        alarm = None
        if deadline is not None:
            alarm = threading.Timer(max(0.0, deadline - time.monotonic()), self._wake)
            alarm.start()
        try:
            while not claim() and (deadline is None or time.monotonic() < deadline):
                self._step(deadline, claim)
        finally:
            if alarm is not None:
                alarm.cancel()
                alarm.join()

    def look(self) -> None:
        """Where there is no thread that drives, do what can be done without waiting."""
        if self.has_thread or self._turn.mine:
            return
        for _ in range(len(self._running.graph.nodes) + 2):  # so an item comes through
            if self._ended:
                return
            self._wake()
            self._step()

    def attend(self) -> None:
        """Where there is no thread that drives, let the event loop that runs here do so, if there is one."""
        if self.has_thread or "asyncio" not in sys.modules:
            return
        import asyncio

        with contextlib.suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            if self._attending is not loop:
                self._attending = loop
                loop.call_soon(self._attend, loop)

    def _attend(self, loop: Any) -> None:
        self.look()
        if self._ended or not any(future.watched for future in list(self._futures.values())):
            self._attending = None
        else:
            loop.call_later(ATTEND_SECONDS, self._attend, loop)

    def _in_driver(self, function: Callable[[], T]) -> T:
        """Return what *function* returns in the driver's thread."""
        if not self.has_thread:
            return self._in_turn(function)
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

    def _in_turn(self, function: Callable[[], T]) -> T:
        if self._turn.mine:  # a job of this run asks
            return function()
        with self._turn.take(self._wake):
            if self._ended:
                raise JobqError("this run has ended")
            answer = function()
        self._wake()  # whoever drives next looks at what has changed
        self._call_here()
        return answer


class _Source(Iterator[Any]):
    """What a mapping reads ahead: what it raises is kept until all that it gave before has had its turn."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self._error: Exception | None = None

    def __next__(self) -> Any:
        if self._error is None:
            try:
                return next(self._items)
            except StopIteration:
                pass
            except Exception as error:  # user code
                self._error = error
        raise StopIteration

    def end(self) -> None:
        """Raise what it raised, if it did."""
        if self._error is not None:
            raise self._error


class _Turn:
    """Whose turn it is to drive, where no thread does so alone: given in the order of asking."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asking: deque[int] = deque()

    @property
    def mine(self) -> bool:
        """Whether it is this thread's."""
        with self._changed:
            return bool(self._asking) and self._asking[0] == threading.get_ident()

    @contextlib.contextmanager
    def take(self, hurry: Callable[[], None], deadline: float | None = None) -> Iterator[bool]:
        """Wait for our turn, telling who has it to *hurry*; gives False if the *deadline* comes first."""
        me = threading.get_ident()
        if self.mine:
            raise JobqError(
                "a job on backend 'inline' can't wait for its own run: it is what it would wait for"
            )
        with self._changed:
            self._asking.append(me)
        if self._asking[0] != me:
            hurry()
        with self._changed:
            rest = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._changed.wait_for(lambda: self._asking[0] == me, rest):
                self._asking.remove(me)
        try:
            yield self._asking.count(me) > 0
        finally:
            with self._changed:
                if me in self._asking:
                    self._asking.popleft()
                    self._changed.notify_all()


class _Door:
    """One way in: what a producer would give, or what a consumer that needs none takes."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self._graph = graph
        self._node = node
        self._router = Router(node.signature.outputs) if node.stage.kind == "producer" else None
        self._checks = {
            name: Validator(graph.nodes[name].signature.item_type) for name in dict.fromkeys(_takers(node))
        }
        # The same object for all items: those in a row are queued together.
        self._only_taker: Takers = ()
        if self._router is None and node.stage.consumer.key is None:
            self._only_taker = ((node.stage.name, None),)

    def takers(self, item: Any) -> Takers:
        """Return those that take *item*, with its keys; none if it fits none of them."""
        if self._only_taker:
            return self._only_taker if self._checks[self._node.stage.name].fits(item) else ()
        names = self._names(item)
        if not any(self._checks[name].fits(item) for name in names):
            return ()
        return tuple((name, self._keys(name, item)) for name in names)

    def unchecked(self, item: Any) -> Takers:
        """Return the same for an item that doesn't fit, where nobody wants that to be checked."""
        names = self._names(item)
        if all(self._graph.nodes[name].stage.consumer.validate_items for name in names):
            return ()
        return tuple((name, self._keys(name, item)) for name in names)

    def reasons(self, item: Any) -> Iterator[str]:
        """Yield, in words, why none of these takes *item*."""
        for name, check in self._checks.items():
            kind = spell(self._graph.nodes[name].signature.item_type)
            for problem in check.check([item]).values():
                yield f"{name}() takes {kind}: {problem}"

    def _names(self, item: Any) -> tuple[str, ...]:
        if self._router is None:
            return (self._node.stage.name,)
        member = self._router.member(item)
        return self._node.routes[self._node.member_routes[member]].takers if member >= 0 else ()

    def _keys(self, name: str, item: Any) -> tuple[Any, ...] | None:
        key = self._graph.nodes[name].stage.consumer.key
        return None if key is None else (key_of(key, item),)


def _doors(graph: Graph) -> list[Node]:
    """Return the ways in: what producers give, else each consumer without ``source=``, in order."""
    producers = graph.producers()
    return producers or [node for node in graph.consumers() if not node.stage.source]


def _takers(node: Node) -> list[str]:
    """Return the names of the stages behind a way in."""
    if node.stage.kind == "producer":
        return [name for route in node.routes for name in route.takers]
    return [node.stage.name]
