"""What a function gives for each item of an iterator: a run that the caller's loop feeds and reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jobq.events import Event, JobDead
from jobq.feed import Feed
from jobq.ladder import hand_on, interruption
from jobq.letters import rebuild
from jobq.stream import ResultStream

if TYPE_CHECKING:
    from jobq.events import Observer
    from jobq.graph import Graph
    from jobq.outcome import Outcome
    from jobq.report import Report
    from jobq.results import Sink
    from jobq.running import Running
    from jobq.wire import Block, Codec

#: So many items may have been read whose results were not taken yet.
READ_AHEAD = 1000
#: Fewer are not read: workers have enough to do, and small blocks cost as much as large ones.
WORTH_READING = READ_AHEAD // 4


class MapStream(ResultStream):
    """
    The results of a pipeline of one stage that gives one for each of *items*.

    These are read in the thread that asks for results, a little ahead. No item is followed by itself: blocks
    of them go in, blocks of results come out. With *ordered*, the stage's outputs are in order.
    """

    def __init__(
        self,
        start: Callable[[Sink, Sequence[Observer], Callable[[Graph, Codec], Feed]], Running],
        observing: contextlib.AbstractContextManager[Sequence[Observer]],
        conclude: Callable[[Outcome], Report],
        items: Iterable[Any],
        *,
        ordered: bool,
    ) -> None:
        super().__init__(
            lambda sink, observers: start(sink, [*observers, self._observe], self._make_feed),
            observing,
            conclude,
            heeds=False,
        )
        self._source = items
        self._ordered = ordered
        self._taken = 0  # results
        self._dead: set[int] = set()  # the places of items that failed
        self._run_is_over = False

    def _make_feed(self, graph: Graph, codec: Codec) -> Feed:
        (name,) = graph.nodes
        self._feed = Feed(name, self._source, codec, self._sink.nudge)
        return self._feed

    def _observe(self, event: Event) -> None:
        """Note an item that failed, in the driver's thread: before any result that comes after it."""
        if isinstance(event, JobDead) and event.letter.status == "dead" and event.letter.job is not None:
            self._dead.add(event.letter.job)
            self._sink.nudge()

    def _begin(self) -> None:
        super()._begin()
        assert self._running is not None
        self._feed.wake = self._running.driver.wake

    def _ended(self) -> Outcome:
        self._feed.drop()
        self._source = ()
        return super()._ended()

    def _take(self) -> tuple[str, Block] | None:
        given = None
        while given is None:
            self._leave_if_stopped()
            self._raise_if_failed()
            self._read_ahead()
            given = self._sink.poll()
            if given is None and not self._goes_on():
                self._raise_if_failed(over=True)
                return None
        stage, block = given
        if self._ordered and (missing := self._first_missing()) is not None:
            block = block.take(0, max(0, min(block.count, missing - self._taken)))
        self._taken += block.count
        return stage, block

    def _first_missing(self) -> int | None:
        """Return the place of the first item that has no result: what comes after it is not given."""
        assert self._running is not None
        # Noted before what was held for them is let go.
        cancelled = [part.first for one in self._running.driver.cancelled for part in one.parts]
        return min([*self._dead, *cancelled], default=None)

    def _leave_if_stopped(self) -> None:
        """Where jobs run in this thread, and a stop signal is the run's, be interrupted by it."""
        if self._thread is None and self._running is not None and self._running.driver.stops:
            number = self._stop()
            if number is not None:
                hand_on(number, self.report, unfinished=True)
            raise interruption(self.report)

    def _read_ahead(self) -> None:
        assert self._running is not None
        feed, before = self._feed, self._feed.exhausted
        waiting = feed.read - self._taken
        if READ_AHEAD - waiting >= WORTH_READING:
            feed.fill(waiting, READ_AHEAD, self._has_something_better_to_do)
        if feed.exhausted and not before:
            self._running.driver.call(self._no_more_comes)

    def _has_something_better_to_do(self) -> bool:
        """Whether there is a result to be given, or nobody else who would do the jobs."""
        return self._thread is None or self._sink.has_some

    def _no_more_comes(self) -> None:
        assert self._running is not None
        self._running.driver.scheduler.fed = False

    def _goes_on(self) -> bool:
        """Wait for something to happen; return whether there may be more to come."""
        assert self._running is not None
        if self._thread is not None:
            return self._sink.wait()
        if self._run_is_over:
            return False
        with self._running.attention():
            self._run_is_over = self._running.driver.step()
        return True

    def _raise_if_failed(self, *, over: bool = False) -> None:
        """Raise what is due: of the next item; of any where there is no order, or no more results come."""
        if self._dead and (over or not self._ordered or self._taken in self._dead):
            raise self._exception_of(min(self._dead))
        if self._feed.error is not None and self._taken == self._feed.read:
            raise self._feed.error

    def _exception_of(self, place: int) -> Exception:
        assert self._running is not None
        dead, letter = next(
            (dead, letter) for dead, letter in self._running.letters.kept if letter.job == place
        )
        return rebuild(dead.failure, dead.stage, dead.part, item=letter.item, index=place)
