"""
The worker's side of an answer: outcomes gather here and leave as one frame.

What is finished never waits long for company: the working thread sends a chunk's outcomes when the chunk
is through; a second thread, the flusher, looks every few milliseconds whether something finished lies
there, so that a job that takes long does not keep back what was done before it.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jobq.claims import Claims
from jobq.retirement import Retirement
from jobq.wire import Answer, Block, Codec, Counted, Failure, Output, PackedScalars, Totals

#: How often the flusher looks, in seconds: no sooner than a chunk is to be through, which then is one answer.
TICK_SECONDS = 0.005
#: After so many looks in vain it looks seldom, and between orders not at all.
IDLE_TICKS = 5
#: Of these, so many are left when it is woken: between short orders it is woken again and again.
FIRST_LOOKS = 3
#: How often "seldom" is, in seconds: what is done waits no longer, and a long job is hardly disturbed.
LOOK_SECONDS = 0.05


class Marker:
    """Stands in a list of outcomes for a job that gave nothing to encode."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


FILTERED = Marker("FILTERED")
FAILED = Marker("FAILED")
DONE = Marker("DONE")


@dataclass(frozen=True, slots=True)
class Piece:
    """One encoded item: the route that it takes, and its keys there."""

    route: int
    data: Any
    keys: tuple[tuple[int, Any], ...] = ()


class Packer(Protocol):
    """How encoded items of a stage become outputs."""

    def outputs(
        self, pieces: Sequence[Any], parents: Sequence[int] | None, first: int = 0
    ) -> tuple[Output, ...]:
        """
        Return *pieces* as outputs, one for each route among them.

        Without *parents* each is of another job: *first* and those after it.
        """
        ...


@dataclass(frozen=True, slots=True)
class OneRoute:
    """Every item takes route 0, and pieces are what the codec made of items."""

    codec: Codec
    scalars: bool = False

    def outputs(
        self,
        pieces: Sequence[Any],
        parents: Sequence[int] | None,
        first: int = 0,  # noqa: ARG002
    ) -> tuple[Output, ...]:
        """Return one output, or none if there are no pieces."""
        if not pieces:
            return ()
        block: Block = self.codec.scalars(_listed(pieces)) if self.scalars else self.codec.block(pieces)
        return (Output(0, block, _packed(parents)),)


@dataclass(frozen=True, slots=True)
class NoTaker:
    """Nobody wants the items: they are counted only."""

    def outputs(
        self,
        pieces: Sequence[Any],
        parents: Sequence[int] | None,
        first: int = 0,  # noqa: ARG002
    ) -> tuple[Output, ...]:
        """Return how many there were."""
        return (Output(0, Counted(len(pieces)), _packed(parents)),) if pieces else ()


@dataclass(frozen=True, slots=True)
class ManyRoutes:
    """Pieces are `Piece`: each item takes the route of its type, and may have keys."""

    codecs: tuple[Codec | None, ...]  # by route; None: counted only

    def outputs(
        self, pieces: Sequence[Piece], parents: Sequence[int] | None, first: int = 0
    ) -> tuple[Output, ...]:
        """Return an output for each route among the pieces, items in order."""
        outputs = []
        for route, codec in enumerate(self.codecs):
            places = [i for i, piece in enumerate(pieces) if piece.route == route]
            if not places:
                continue
            chosen = [pieces[i] for i in places]
            block: Block = (
                Counted(len(chosen)) if codec is None else codec.block([piece.data for piece in chosen])
            )
            takers = [place for place, _ in chosen[0].keys]
            keys = tuple(
                (place, tuple(piece.keys[i][1] for piece in chosen)) for i, place in enumerate(takers)
            )
            whole = parents is None and len(places) == len(pieces)
            indices = None if whole else [parents[i] if parents is not None else first + i for i in places]
            outputs.append(Output(route, block, _packed(indices), keys))
        return tuple(outputs)


def _listed(pieces: Sequence[Any]) -> list[Any]:
    """Return *pieces* as a list: nearly always they are one, of which nobody else knows."""
    return pieces if isinstance(pieces, list) else list(pieces)


def _may_hold_none(outputs: Sequence[Output]) -> bool:
    """Whether there may be a None among scalars; of those that are all of one type it is known."""
    return not all(
        isinstance(output.block, PackedScalars) and output.block.only not in ("", "NoneType")
        for output in outputs
    )


def _packed(parents: Sequence[int] | None) -> bytes | None:
    return None if parents is None else array("I", parents).tobytes()


@dataclass(slots=True)
class Counters:
    """This worker's own count of what it did, for the balance."""

    done: int = 0
    filtered: int = 0
    failed: int = 0
    emitted: list[int] = field(default_factory=list)

    def totals(self) -> Totals:
        """Return the counts as they stand."""
        return Totals(self.done, self.filtered, self.failed, tuple(self.emitted))


@dataclass(slots=True)
class Tally:
    """The outcomes of one order, in the order in which jobs ended; ``sent`` of them have left."""

    number: int
    began: float
    items: list[Any] = field(default_factory=list)
    outcomes: list[Any] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    sent: int = 0
    marked: bool = False  # an outcome may be FILTERED or FAILED; set before it is appended
    told: set[int] = field(default_factory=set)  # indices of the failures that have left


class Forkable(Protocol):
    """Something with a lock that another thread may hold when a job forks."""

    def renew(self) -> None:
        """Be usable in a copy of the process, which has one thread."""
        ...


_forkable: weakref.WeakSet[Forkable] = weakref.WeakSet()


def survive_forks(one: Forkable) -> None:
    """Have *one* renewed in copies of this process: a job may fork, and come back to us twice."""
    _forkable.add(one)


def _renew_all() -> None:
    for one in list(_forkable):
        one.renew()


os.register_at_fork(after_in_child=_renew_all)


class Flusher:
    """
    A thread that looks every few milliseconds while something comes of it, else now and then.

    *look* returns whether it sent anything; None: jobs go on ending, so what is done waits for their chunk's
    end, unless the next look sees that they don't. While *busy* an order is in hand: a job of it may end and
    a long one begin, and nobody tells us.
    """

    def __init__(self, look: Callable[[], bool | None], busy: Callable[[], bool]) -> None:
        self._look = look
        self._busy = busy
        self._armed = threading.Event()
        self._asleep = True
        self._thread: threading.Thread | None = None
        self._ended = False
        self._end = threading.Lock()  # held until then: to wait for a lock takes no time of Python's
        self._end.acquire()

    def watch(self) -> None:
        """Look now and then as long as there are orders (cheap: called for each)."""
        if self._asleep:
            self.arm()

    def arm(self) -> None:
        """Look soon (cheap: called for what a producer gives)."""
        if self._armed.is_set():
            return
        self._armed.set()
        if self._thread is None:
            thread = threading.Thread(target=self._loop, name="jobq-flusher", daemon=True)
            thread.start()
            self._thread = thread  # not before: `close` would wait for one that could not be started

    def _loop(self) -> None:
        idle = 0
        self._asleep = False
        while not self._ended:
            if idle <= IDLE_TICKS:
                self._end.acquire(timeout=TICK_SECONDS)
            else:
                # Whoever arms us just before this is in an order, which we then see: it waits for one look.
                self._armed.clear()
                if self._ended:  # `close` says both, in this order
                    return
                self._asleep = True  # before we look who is busy: whoever is so later sees it
                busy = self._busy()
                self._asleep = not busy
                if self._armed.wait(LOOK_SECONDS if busy else None):
                    idle = IDLE_TICKS - FIRST_LOOKS
                self._asleep = False
            sent = self._look()
            if sent is None and not self._ended:
                self._end.acquire(timeout=TICK_SECONDS)
                sent = self._look()
            idle = 0 if sent else idle + 1

    def renew(self) -> None:
        """Have nothing to do any more: the thread is not there."""
        self._end = threading.Lock()
        self._armed = threading.Event()
        self._armed.set()
        self._asleep = False
        self._thread = None

    def close(self) -> None:
        """End the thread and wait for its end."""
        self._ended = True
        self._armed.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._end.release()
            thread.join()


class Outbox:
    """
    Sends what is finished of the order in hand.

    Who is *patient* now sends it at the order's end, or when no job ends any more for a few milliseconds: an
    answer costs as much as a hundred small jobs. ``flusher`` is None where there is no second thread.

    With *drops_none* a None among scalars is not given on: it is looked for when they are packed, where their
    types are seen anyway, since to look at each item takes as long as a tenth of all else.

    ``tally.outcomes`` holds one entry per finished job, in order: DONE, FILTERED, FAILED, or what it gave (a
    piece, or a list of pieces where a job gives many). The working thread appends, which is atomic; whoever
    flushes holds ``_lock``.
    """

    def __init__(
        self,
        send: Callable[[Answer], None],
        packer: Packer,
        routes: int,
        *,
        many: bool,
        flusher: bool,
        refuse: Callable[[int, BaseException, Any], Failure],
        retirement: Retirement | None = None,
        patient: Callable[[], bool] = lambda: False,
        drops_none: bool = False,
    ) -> None:
        self._send = send
        self._drops_none = drops_none
        self._refuse = refuse
        self._packer = packer
        self._many = many
        self._retirement = retirement or Retirement()
        self._lock = threading.Lock()
        self._counters = Counters(emitted=[0] * routes)
        self.tally: Tally | None = None
        self.claims: Claims | None = None
        self._patient = patient
        self._seen = (-1, 0)  # the order, and how many of its jobs had ended at the last look
        self.flusher = Flusher(self._look, lambda: self.tally is not None) if flusher else None
        survive_forks(self)

    def renew(self) -> None:
        """Be usable in a copy of the process, whose only thread is the one that forked."""
        self._lock = threading.Lock()
        if self.claims is not None:
            self.claims.renew()
        if self.flusher is not None:
            self.flusher.renew()

    def begin(self, number: int, *, alone: bool = False) -> Tally:
        """Start the tally of an order; with *alone* nothing can wait behind anything in it."""
        tally = self.tally = Tally(number, time.monotonic())
        if self.flusher is not None and not alone:
            if self._patient():
                self.flusher.watch()
            else:
                self.flusher.arm()
        return tally

    def _look(self) -> bool | None:
        """Send what is finished and give back what is claimed and waits; return what a `Flusher` asks."""
        if self.claims is not None:
            self.claims.narrow()
        tally = self.tally
        if self._patient() and tally is not None and not tally.notes:
            before, self._seen = self._seen, (tally.number, len(tally.outcomes))
            if self._seen != before and len(tally.outcomes) > tally.sent:
                return None
        return self.flush()

    def flush(self, *, final: bool = False, ended: bool = False) -> bool:
        """Send what has not been sent yet, if there is anything; return whether there was."""
        with self._lock:
            tally = self.tally
            if tally is None:
                return False
            high = len(tally.outcomes)
            if (
                high == tally.sent
                and not final
                and not tally.notes
                and len(tally.failures) == len(tally.told)
            ):
                return False
            self._send(self._answer(tally, high, final, ended))
            if final:
                self.tally = None
            return True

    def part(self, index: int, pieces: list[Any]) -> None:
        """Send *pieces* of a job that has not ended: they count as they come."""
        with self._lock:
            tally = self.tally
            assert tally is not None
            outputs = self._packer.outputs(pieces, [index] * len(pieces))
            self._count_outputs(outputs)
            self._send(Answer(tally.number, False, outputs=outputs, totals=self._counters.totals()))

    def _answer(self, tally: Tally, high: int, final: bool, ended: bool) -> Answer:
        low = tally.sent
        try:
            settled, filtered, outputs = self._pack(tally, low, high)
        except BaseException:  # a piece that is an item, and neither a scalar nor picklable
            self._take_out_unfit(tally, low, high)
            settled, filtered, outputs = self._pack(tally, low, high)
        tally.sent = high  # only now: what could not be packed (no memory) is tried again at the chunk's end
        # A failure may have been written down just before its place among the outcomes: next time then.
        failures = tuple(
            failure for failure in tally.failures if failure.index < high and failure.index not in tally.told
        )
        tally.told.update(failure.index for failure in failures)
        notes, tally.notes = tuple(tally.notes), []
        now = time.monotonic()
        busy, tally.began = now - tally.began, now
        counters = self._counters
        done = sum(b - a for a, b in settled)
        counters.done += done - len(filtered)
        counters.filtered += len(filtered)
        counters.failed += len(failures)
        self._count_outputs(outputs)
        return Answer(
            tally.number,
            final,
            settled,
            filtered,
            failures,
            outputs,
            counters.totals(),
            busy,
            ended,
            notes,
            leaving=self._retirement.why,
        )

    def _pack(
        self, tally: Tally, low: int, high: int
    ) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], tuple[Output, ...]]:
        outcomes = tally.outcomes[low:high]
        if not tally.marked and not self._many and outcomes:  # nearly always
            pieces = [] if outcomes[0] is DONE else outcomes
            outputs = self._packer.outputs(pieces, None, low)
            if not self._drops_none or not _may_hold_none(outputs) or not self._drop_none(tally, low, high):
                return ((low, high),), (), outputs
            outcomes = tally.outcomes[low:high]
        settled, filtered, pieces, parents = self._sort(outcomes, low)
        return settled, filtered, self._packer.outputs(pieces, parents)

    @staticmethod
    def _drop_none(tally: Tally, low: int, high: int) -> bool:
        """Let each None count for nothing; return whether there was one."""
        places = [place for place in range(low, high) if tally.outcomes[place] is None]
        for place in places:
            tally.marked = True
            tally.outcomes[place] = FAILED
        return bool(places)

    def _take_out_unfit(self, tally: Tally, low: int, high: int) -> None:
        """Let each job fail that gave something that can't travel."""
        for index in range(low, high):
            outcome = tally.outcomes[index]
            if isinstance(outcome, Marker):
                continue
            try:
                self._packer.outputs(outcome if self._many else [outcome], None)
            except BaseException as error:  # user code runs in it
                item = tally.items[index] if index < len(tally.items) else outcome
                tally.marked = True
                tally.outcomes[index] = FAILED
                tally.failures.append(self._refuse(index, error, item))

    def _count_outputs(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            self._counters.emitted[output.route] += output.block.count

    def _sort(
        self, outcomes: list[Any], low: int
    ) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], list[Any], list[int] | None]:
        """Return what is settled, what is filtered, what was given, and by which job each was."""
        settled: list[tuple[int, int]] = []
        filtered: list[int] = []
        pieces: list[Any] = []
        parents: list[int] = []
        for index, outcome in enumerate(outcomes, low):
            if outcome is FAILED:
                continue
            if settled and settled[-1][1] == index:
                settled[-1] = (settled[-1][0], index + 1)
            else:
                settled.append((index, index + 1))
            if outcome is FILTERED:
                filtered.append(index)
            elif outcome is not DONE:
                given = outcome if self._many else (outcome,)
                pieces += given
                parents += [index] * len(given)
        return tuple(settled), tuple(filtered), pieces, parents

    def close(self) -> None:
        """End the flusher."""
        if self.flusher is not None:
            self.flusher.close()
