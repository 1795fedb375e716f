"""`Pipeline.stream`: results as they come, the driver in a thread of its own where the backend lets it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jobq.errors import JobqError
from jobq.ladder import Ladder, hand_on, interrupt_later
from jobq.letters import cannot_be_loaded
from jobq.results import Sink, Stream
from jobq.wire import Undecodable

if TYPE_CHECKING:
    from jobq.events import Observer
    from jobq.outcome import Outcome
    from jobq.report import Report
    from jobq.running import Running
    from jobq.wire import Block


class ResultStream(Iterator[Any]):
    """
    The results of a run as they come. A context manager: leaving it stops the run.

    It has one reader at a time: ``next()`` raises `JobqError` while another thread is in it.
    """

    def __init__(
        self,
        start: Callable[[Sink, Sequence[Observer]], Running],
        observing: contextlib.AbstractContextManager[Sequence[Observer]],
        conclude: Callable[[Outcome], Report],
        *,
        heeds: bool = True,
    ) -> None:
        """*heeds*: stop signals are the run's; else they are only where jobs run in this thread."""
        self._heeds = heeds
        self._start = start
        self._observing = observing
        self._conclude = conclude
        self._sink = Stream()
        self._running: Running | None = None
        self._thread: threading.Thread | None = None
        self._items: list[Any] = []
        self._stage = ""  # that gave them
        self._complete = True  # no result was one that can't be loaded
        self._cleanup = contextlib.ExitStack()
        self._over = False
        self._reading = threading.Lock()
        self._crashes: list[BaseException] = []
        self.report: Report | None = None

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from iter(self._next, _END)
        except GeneratorExit:
            self._leave()
            raise
        finally:
            self._stop()

    def __next__(self) -> Any:
        item = self._next()
        if item is _END:
            raise StopIteration
        return item

    def _next(self) -> Any:
        if not self._reading.acquire(blocking=False):
            raise JobqError("this stream is being read already: a stream has one reader at a time.")
        try:
            return self._read()
        finally:
            self._reading.release()

    def _read(self) -> Any:
        if not self._items and not self._fetch():
            return _END
        item = self._items.pop()
        if isinstance(item, Undecodable):
            self._complete = False
            raise cannot_be_loaded(item, self._stage)
        return item

    def _fetch(self) -> bool:
        """Have results to give; False: no more come."""
        while not self._items:
            if self._over:
                return False
            if self._running is None:
                self._begin()
            given = self._take()
            if given is None:
                self._finish()
                return False
            assert self._running is not None
            self._stage, block = given
            self._items = self._running.backend.codec.decode(block)[::-1]
        return True

    def _begin(self) -> None:
        observers = self._cleanup.enter_context(self._observing)
        try:
            with contextlib.ExitStack() as starting:
                ladder = starting.enter_context(Ladder())
                running = self._running = self._start(self._sink, observers)
                self._cleanup.callback(running.driver.close)
                if self._heeds or not running.backend.own_thread:
                    ladder.lead(running.climb)
                    self._cleanup.push(starting.pop_all())
            self._sink.wake = running.driver.wake
            if running.backend.own_thread:
                # It holds no reference to this stream: one that nobody holds any more is closed.
                self._thread = running.start_thread(_drive, running, self._sink, self._crashes)
        except BaseException:
            self._over = True
            if self._running is not None:
                self._running.driver.release()
            self._cleanup.close()
            raise
        if self._thread is None:
            self._cleanup.callback(running.driver.release)
            running.driver.begin()

    def _take(self) -> tuple[str, Block] | None:
        assert self._running is not None
        with self._running.attention():
            if self._thread is not None:
                return self._sink.take()
            while (given := self._sink.poll()) is None:
                if self._running.driver.step():
                    return self._sink.poll()
        return given

    def _finish(self) -> None:
        """Take the run as ended: set the report, raise what it ended with."""
        self._over = True
        with self._cleanup:
            outcome = self._ended()
        self._conclude(outcome)

    def _ended(self) -> Outcome:
        assert self._running is not None
        if self._thread is not None:
            with (
                self._running.attention()
            ):  # up to 3.12 a `join` that is interrupted takes the thread for ended
                self._thread.join()
        if self._crashes:
            raise self._crashes[0]
        outcome = self._running.conclude()
        outcome.report.ok &= self._complete
        self.report = outcome.report
        return outcome

    def close(self) -> None:
        """
        Stop the run if it has not ended; jobs in flight and queued are cancelled. Idempotent.

        Raises `KeyboardInterrupt` if a signal had told the run to stop: the program has not heard of it yet.
        If it has a handler of its own for that signal, that is called instead.
        """
        self._tell(self._stop())

    def _tell(self, number: int | None) -> None:
        """Let the program hear of a signal. It has left by itself: what is unfinished is nobody's loss."""
        if number is not None:
            hand_on(number, self.report, unfinished=False)

    def _leave(self) -> None:
        """Close, in a place where whatever is raised is lost."""
        if self._stop() is not None:
            interrupt_later()

    def _stop(self) -> int | None:
        """Stop the run if it has not ended; return the signal that it heard, if the program didn't."""
        if self._over:
            return None
        self._over = True
        if self._running is None:
            return None
        self._items = []
        with self._cleanup:
            self._running.driver.abandon()
            if self._thread is None:
                with self._running.attention():
                    while not self._running.driver.step():
                        pass
            try:
                return self._ended().heard
            except KeyboardInterrupt:  # somebody does not come to an end, and is not to be waited for
                self._running.driver.request_stop()
                self._ended()
                raise

    def __enter__(self) -> ResultStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        number = self._stop()
        if kind is None:
            self._tell(number)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be going down
            self._leave()


def _drive(running: Running, sink: Stream, crashes: list[BaseException]) -> None:
    try:
        running.driver.run()
    except BaseException as error:  # a bug in jobq: the caller must hear of it
        crashes.append(error)
    finally:
        sink.end()


class _End:
    """Stands for the end of a stream."""


_END = _End()
