"""`Pipeline.stream`: results as they come, the driver in a thread of its own where the backend lets it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jobq.ladder import Ladder
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
    """The results of a run as they come. A context manager: leaving it stops the run."""

    def __init__(
        self,
        start: Callable[[Sink, Sequence[Observer]], Running],
        observing: contextlib.AbstractContextManager[Sequence[Observer]],
        conclude: Callable[[Outcome], Report],
    ) -> None:
        self._start = start
        self._observing = observing
        self._conclude = conclude
        self._sink = Stream()
        self._running: Running | None = None
        self._thread: threading.Thread | None = None
        self._items: list[Any] = []
        self._cleanup = contextlib.ExitStack()
        self._over = False
        self._crashes: list[BaseException] = []
        self.report: Report | None = None

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from iter(self._next, _END)
        finally:
            self.close()

    def __next__(self) -> Any:
        item = self._next()
        if item is _END:
            raise StopIteration
        return item

    def _next(self) -> Any:
        while not self._items:
            if self._over:
                return _END
            if self._running is None:
                self._begin()
            block = self._take()
            if block is None:
                self._finish()
                return _END
            assert self._running is not None
            self._items = self._running.backend.codec.decode(block)[::-1]
        item = self._items.pop()
        if isinstance(item, Undecodable):
            raise cannot_be_loaded(item)
        return item

    def _begin(self) -> None:
        observers = self._cleanup.enter_context(self._observing)
        try:
            ladder = self._cleanup.enter_context(Ladder())
            running = self._running = self._start(self._sink, observers)
            self._cleanup.callback(running.driver.close)
            self._sink.wake = running.driver.wake
            ladder.lead(running.climb)
        except BaseException:
            self._over = True
            self._cleanup.close()
            raise
        if running.backend.own_thread:
            # The thread holds no reference to this stream: one that nobody holds any more is closed.
            self._thread = threading.Thread(
                target=_drive, args=(running, self._sink, self._crashes), name="jobq-driver", daemon=True
            )
            self._thread.start()
        else:
            self._cleanup.callback(running.driver.release)
            running.driver.begin()

    def _take(self) -> Block | None:
        assert self._running is not None
        with self._running.attention():
            if self._thread is not None:
                return self._sink.take()
            while (block := self._sink.poll()) is None:
                if self._running.driver.step():
                    return self._sink.poll()
        return block

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
        self.report = outcome.report
        return outcome

    def close(self) -> None:
        """Stop the run if it has not ended; jobs in flight and queued are cancelled. Idempotent."""
        if self._over:
            return
        self._over = True
        if self._running is None:
            return
        self._items = []
        with self._cleanup:
            self._running.driver.abandon()
            if self._thread is None:
                with self._running.attention():
                    while not self._running.driver.step():
                        pass
            self._ended()

    def __enter__(self) -> ResultStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be going down
            self.close()


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
