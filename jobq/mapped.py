"""What a function gives for each item of an iterator: a run that the caller's loop feeds and reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jobq.events import Event, JobDead
from jobq.feed import Feed
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


class Mapped(ResultStream):
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
            self._raise_if_failed()
            self._read_ahead()
            given = self._sink.poll()
            if given is None and not self._goes_on():
                self._raise_if_failed(over=True)
                return None
        stage, block = given
        if self._dead and self._ordered:  # what comes after one that failed is not given
            block = block.take(0, min(block.count, min(self._dead) - self._taken))
        self._taken += block.count
        return stage, block

    def _read_ahead(self) -> None:
        assert self._running is not None
        feed, before = self._feed, self._feed.exhausted
        waiting = feed.read - self._taken
        if READ_AHEAD - waiting >= WORTH_READING:
            feed.fill(waiting, READ_AHEAD, lambda: self._sink.has_some)
        if feed.exhausted and not before:
            self._running.driver.call(self._no_more_comes)

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
