"""
A backend whose workers live in a simulated world: they do the real work, when and as far as chance has it.

A worker runs a chunk job by job through the real `jobq.work`, so your functions run; its page, its answers,
its death and all their times are the world's. Nothing here knows what the scheduler should do: what happened
is told to the `Ledger`, which judges.
"""

from __future__ import annotations

import contextlib
import pickle
import selectors
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from jobq.backend import (
    CLAIMED,
    DECODING,
    IDLE,
    LANES,
    LIMIT,
    NO_LIMIT,
    STOPPING,
    Page,
    Plan,
    Recipe,
    Waitable,
    Work,
    blank_page,
    may_begin,
    page_words,
    past,
)
from jobq.backends.child import describe_failure
from jobq.errors import BrokenChannel, EndOfChannel
from jobq.pool import SLOW_SECONDS
from jobq.shapes import SCALARS
from jobq.testing.ledger import Books, Ledger, Tag
from jobq.testing.world import InjectedFailure, World
from jobq.wire import (
    PROTOCOL,
    Answer,
    Bye,
    Chunk,
    Codec,
    Failure,
    Grant,
    Hello,
    Order,
    Output,
    Part,
    Said,
    Totals,
    Undecodable,
)
from jobq.work import StageRecipe, is_first_try, places

#: How a worker ends that dies.
KILLED = "was killed by SIGKILL"
#: Once in so many kills the kernel holds the process for longer than the driver waits.
HELD_BY_KERNEL = 0.01


# ── items ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Pickled:
    """An item as bytes."""

    data: bytes


@dataclass(slots=True)
class Tracked:
    """Items, each with a tag by which it is known wherever it turns up. A `jobq.wire.Block`."""

    pieces: list[Any]
    nbytes: int
    tags: list[Tag] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many items."""
        return len(self.pieces)

    @property
    def weight(self) -> int:
        """What they count of the bytes that a chunk may have."""
        return self.nbytes

    @property
    def shared(self) -> bool:
        """Whether a part of it would carry the bytes of all: scalars are pickled as one list."""
        return bool(self.pieces) and type(self.pieces[0]) is not Pickled

    def take(self, low: int, high: int) -> Tracked:
        """Return the items ``low <= i < high``."""
        if low == 0 and high == len(self.pieces):
            return self
        pieces = self.pieces[low:high]
        return Tracked(pieces, sum(map(_size, pieces)), self.tags[low:high])


def _size(piece: Any) -> int:
    if type(piece) is Pickled:
        return len(piece.data)
    return len(piece) if type(piece) in (str, bytes) else 8


class TrackingCodec:
    """Pickles what could change after its yield, as processes do; unless items go *by_reference*."""

    def __init__(self, by_reference: bool) -> None:
        self.by_reference = by_reference
        self.by_rows = False
        self.undecoded = 0

    def encode(self, item: Any) -> Any:
        """Return *item* as it is now."""
        if self.by_reference or type(item) in SCALARS:
            return item
        return Pickled(pickle.dumps(item, PROTOCOL))

    def size(self, piece: Any) -> int:
        """Return the bytes of one piece."""
        return _size(piece)

    def block(self, pieces: Sequence[Any]) -> Tracked:
        """Return pieces as a block."""
        return Tracked(list(pieces), sum(map(_size, pieces)))

    def scalars(self, items: list[Any]) -> Tracked:
        """Return items as a block."""
        return self.block([self.encode(item) for item in items])

    def decode(self, block: Any) -> list[Any]:
        """Return a block's items."""
        return [self._loaded(piece.data) if type(piece) is Pickled else piece for piece in block.pieces]

    def shaped(self, shape: Any) -> Codec:  # noqa: ARG002  # the protocol's name
        """Return this one: what travels is nobody's concern."""
        return self

    def _loaded(self, data: bytes) -> Any:
        try:
            return pickle.loads(data)
        except BaseException as error:  # user code runs in it
            self.undecoded += 1
            return Undecodable(error)


# ── workers ──────────────────────────────────────────────────────────────────


class FleetPort:
    """The work's end of its channel: what it says is kept for the worker, who says when it is heard."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.page: Page = [0] * page_words(1)
        self.said: list[Answer] = []
        blank_page(self.page)

    def receive(self) -> Order:
        """Raise: the work is called, it doesn't wait."""
        raise EndOfChannel

    def send(self, answer: Answer) -> None:
        """Keep one answer."""
        self.said.append(answer)


class FleetPage(list[int]):
    """A worker's page; it is told when the driver writes the limit, an instant that races are about."""

    __slots__ = ("limited",)
    limited: Callable[[int], None]

    def __setitem__(self, word: Any, value: Any) -> None:
        if word == LIMIT:
            self.limited(value)
        else:
            super().__setitem__(word, value)

    def write(self, word: int, value: int) -> None:
        """Write a word without telling anybody."""
        super().__setitem__(word, value)


@dataclass(slots=True)
class Done:
    """What came of one job (or batch, or item of a producer): its answer, with indices of the whole order."""

    low: int
    high: int
    answer: Answer


@dataclass(slots=True)
class InHand:
    """An order that a worker has: how far it is, and what it has not sent yet."""

    order: Order
    jobs: list[tuple[Part, int]] = field(default_factory=list)
    next: int = 0
    running: int = 0
    nbytes: int = 0
    skipped: list[int] = field(default_factory=list)
    began: float = 0.0
    ended: bool = False
    done: list[Done] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Job:
    """A job (or batch) that is being done in a lane. ``end`` is what will become of it."""

    hand: InHand
    low: int
    high: int
    lane: int
    fate: str


class FleetWorker:
    """What all kinds of workers share: they start, say things that arrive later, end and die."""

    pid: int | None = None

    def __init__(self, fleet: Fleet, name: str, recipe: Recipe, fd: int, *, lanes: int = 1) -> None:
        self.name = name
        self.fd = fd
        self.world = fleet.world
        self.ledger = fleet.ledger
        words: Page = [0] * page_words(lanes)
        blank_page(words)
        self.page = FleetPage(words)
        self.page.limited = self._limited
        self.waitables = (Waitable(fd, selectors.EVENT_READ),)
        self.held: dict[int, tuple[int, Tag, int]] = {}  # by ticket, what is counted on: number, item, chunk
        self.killed = False  # by the driver
        self.over: list[int] = []  # tickets for which it was
        self.dead = False
        self.released = False
        self._recipe = recipe
        self._port = FleetPort(fleet.codec)
        self._work: Work | None = None
        self._orders: deque[InHand] = deque()
        self._said: deque[tuple[float, Said | Exception, Sequence[Done]]] = deque()
        self._heard_last = 0.0
        self._closing = False
        self.world.at(self.world.takes(), self._open)

    # ── the driver's side ────────────────────────────────────────────────────

    def send(self, order: Order) -> None:
        """Take *order*, to be begun when it has arrived."""
        if not self.dead:
            self._orders.append(InHand(order))
            self.world.at(self.world.pace * 0.1, self._go)

    def receive(self) -> Said | None:
        """Return what has arrived; raise the end."""
        if not self._said or self._said[0][0] > self.world.now:
            self.world.readable.pop(self.fd, None)
            return None
        _, said, done = self._said.popleft()
        if isinstance(said, Exception):
            self.world.readable.pop(self.fd, None)
            self.world.tell("is heard to have ended", self.name, str(said))
            self.ledger.lost(self)
            raise said
        if isinstance(said, Answer):
            self.ledger.heard(self, said, done)
        return said

    def close(self) -> None:
        """Let it end when it has done what it has."""
        self._closing = True
        self.world.at(self.world.pace * 0.1, self._go)

    def kill(self) -> None:
        """Let it die in a moment."""
        if self.killed:
            return
        self.killed = True
        self.ledger.killed(self)
        if self.dead:
            return
        held = self.world.chance.random() < HELD_BY_KERNEL
        self.world.at(20.0 if held else self.world.pace * self.world.chance.random(), self._die)

    def release(self) -> None:
        """Close what is open. Idempotent."""
        self.released = self.dead = True
        self._shut()

    # ── what it says ─────────────────────────────────────────────────────────

    def _say(self, said: Said | Exception, done: Sequence[Done] = ()) -> None:
        """Let the driver hear it after all that was said before."""
        world = self.world
        at = max(self._heard_last, world.now + world.travels())
        self._heard_last = at
        self._said.append((at, said, done))
        world.at(at - world.now, self._ring)

    def _ring(self) -> None:
        if self._said and self._said[0][0] <= self.world.now:
            self.world.readable[self.fd] = None

    # ── how it lives and dies ────────────────────────────────────────────────

    def _open(self) -> None:
        if self.dead:
            return
        if self.world.chance.random() < self.world.faults.deaths * 0.3:
            self._die()
            return
        try:
            self._work = self._recipe.open(self._port)
        except BaseException as error:  # user code, as in a process of its own
            self._break(error)
            return
        self.world.tell("is up", self.name)
        self._say(Hello(0))
        self._go()

    def _die(self, reason: str = KILLED) -> None:
        if self.dead:
            return
        world = self.world
        self.dead = True
        torn = [entry for entry in self._said if entry[0] > world.now]
        if torn and world.chance.random() < 0.3:  # its last frame did not leave whole
            self._said.pop()
        world.tell("dies", self.name, self._tickets())
        self._shut()
        self._say(BrokenChannel(reason))

    def _break(self, error: BaseException) -> None:
        """End because it can't work: no job is to blame."""
        self.page[CLAIMED] = IDLE
        for word in range(LANES, len(self.page), 2):
            self.page[word] = IDLE
        self._die(describe_failure(error))

    def _shut(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            with contextlib.suppress(BaseException):  # user code; this process lives on, so it is closed
                work.close()

    def _end(self) -> None:
        """End as told."""
        work, self._work = self._work, None
        self.dead = True
        try:
            if work is not None:
                work.close()
        except BaseException as error:  # user code
            self._say(BrokenChannel(describe_failure(error)))
            return
        self._say(Bye())
        self._say(EndOfChannel())

    def suspects(self) -> list[tuple[int, int]]:
        """Return the jobs, each with its chunk, that can have killed it as far as its page tells."""
        shown, decoding = self._tickets(), self.page[DECODING]
        return [
            (chunk, number)
            for ticket, (number, _, chunk) in self.held.items()
            if ticket in shown or chunk == decoding
        ]

    def _tickets(self) -> list[int]:
        if self.page[CLAIMED] != IDLE:
            return list(range(self.page[LANES], self.page[CLAIMED]))
        return [self.page[word] for word in range(LANES, len(self.page), 2) if self.page[word] >= 0]

    def _limited(self, limit: int) -> None:
        """The driver writes the limit."""
        self.page.write(LIMIT, limit)

    def _go(self) -> None:
        """Go on with whatever there is to do."""
        if self._work is not None and not self.dead and self._closing:
            self._end()

    def _answer(self, hand: InHand, *, final: bool) -> None:
        """Send what was done of an order."""
        done, hand.done = sorted(hand.done, key=_low), []
        answer = _merged(hand, done, final=final)
        self._totals = answer.totals = _sum(self._totals, [one.answer.totals for one in done])
        answer.busy, hand.began = self.world.now - hand.began, self.world.now
        hand.skipped = []
        self._say(answer, done)

    _totals = Totals()

    def _run(self, order: Order, books: Books, number: int) -> list[Answer]:
        """Have the real work do *order*; its answers, with what it counted in each."""
        assert self._work is not None
        port = self._port
        port.said = []
        port.page[STOPPING] = self.page[STOPPING]
        self._work.run(order)
        places, last = 0, port.said[-1]
        self.ledger.runs += 1
        for answer in port.said:
            before, self._counted = self._counted, answer.totals
            answer.totals = _difference(answer.totals, before)
            for output in answer.outputs:
                block: Any = output.block
                block.tags = [
                    Tag(books.name, number, output.route, place, self.ledger.runs, answer is not last)
                    for place in range(places, places + block.count)
                ]
                places += block.count
        return port.said

    _counted = Totals()


def _low(done: Done) -> int:
    return done.low


class ConsumerWorker(FleetWorker):
    """Does chunks, job by job, in one lane or several."""

    def __init__(self, fleet: Fleet, name: str, recipe: StageRecipe, fd: int) -> None:
        alone = replace(recipe, lanes=1, flusher=False, stage=_without_limit(recipe))
        super().__init__(fleet, name, alone, fd, lanes=recipe.lanes)
        self.books = self.ledger.stages[recipe.stage.name]
        self._retriable = issubclass(InjectedFailure, recipe.stage.consumer.retry_on)
        self._timeout = recipe.stage.consumer.timeout
        self._lanes = recipe.lanes
        self._batched = recipe.signature.batched
        self._free = list(range(recipe.lanes))
        self._jobs: list[Job] = []
        self._hidden = False
        self._hesitates = False  # its page shows a job, and it has not looked at the limit since
        self._fresh = False  # likewise a claim
        self._races = False  # the driver is about to write the limit
        #: Whether it claims jobs by the dozen, as workers do whose jobs take next to no time.
        quick = recipe.lanes == 1 and not self._batched and recipe.stage.consumer.max_deliveries > 1
        self._quick = quick and self._timeout is None and self.world.chance.random() < 0.6

    def send(self, order: Order) -> None:
        """Take a chunk."""
        assert isinstance(order, Chunk)
        self.ledger.sent(self, order)
        super().send(order)
        if self.world.chance.random() < self.world.faults.deaths * 0.2:
            self.world.at(self.world.takes(), self._die)

    def _go(self) -> None:
        """Begin jobs while a lane is free; answer what is through; end if nothing is left."""
        while not self.dead and self._work is not None and self._free and not self._hesitates:
            hand = self._next()
            if hand is None:
                break
            self._begin(hand)
        if self._closing and not self._orders and not self._jobs and not self.dead and self._work is not None:
            self._end()

    def suspects(self) -> list[tuple[int, int]]:
        """Of a batch, which is one call, all jobs can have."""
        found = super().suspects()
        if self._batched:
            shown = {*self._tickets(), self.page[DECODING]}
            found = [(chunk, number) for number, _, chunk in self.held.values() if chunk in shown]
        return found

    def _next(self) -> InHand | None:
        for hand in self._orders:
            assert isinstance(hand.order, Chunk)
            if hand.next < hand.order.count:
                if not hand.jobs:
                    hand.jobs = list(places(hand.order))
                    hand.began = self.world.now
                return hand
            if self._lanes == 1:
                return None  # it has to be answered first
        return None

    def _begin(self, hand: InHand) -> None:
        """Show the next job, or a claim, then look at the limit: at once, or a moment later."""
        world, page, lane = self.world, self.page, self._free.pop()
        if self._hidden:
            self._decide(hand, lane, IDLE)
            return
        assert isinstance(hand.order, Chunk)
        word = LANES + 2 * lane
        before, ticket = page[word], hand.order.number + hand.next
        if page[CLAIMED] == IDLE and self._quick and is_first_try(hand.order):
            page[CLAIMED] = ticket + min(hand.order.count - hand.next, world.chance.randint(2, 8))
            self._fresh = True
        shows = page[CLAIMED] == IDLE or self._fresh
        if shows:
            page[word + 1] = world.monotonic_ns()
            page[word] = ticket
        near = self._races or page[LIMIT] != NO_LIMIT  # the driver looks just now, or may look again
        self._hesitates = shows and world.chance.random() < world.faults.races * (1 if near else 0.2)
        if self._hesitates:
            seconds = world.takes() + SLOW_SECONDS * (1 + 4 * world.chance.random())
            world.at(seconds, lambda: self._go_on(hand, lane, before))
        else:
            self._decide(hand, lane, before)

    def _go_on(self, hand: InHand, lane: int, before: int) -> None:
        self._hesitates = False
        if not self.dead and self._work is not None:
            self._decide(hand, lane, before)
            self._go()

    def _decide(self, hand: InHand, lane: int, before: int) -> None:
        """Begin the next job, if the limit allows it; else *lane* shows what it did *before*."""
        world, page = self.world, self.page
        assert isinstance(hand.order, Chunk)
        low, count = hand.next, hand.order.count
        ticket = hand.order.number + low
        if self._fresh and not may_begin(page, page[CLAIMED] - 1):
            page[CLAIMED] = IDLE
        self._fresh = False
        claimed = page[CLAIMED] != IDLE
        if not (claimed or self._hidden or may_begin(page, ticket)):
            self._free.append(lane)
            if self._lanes > 1:
                page[LANES + 2 * lane] = before
                hand.skipped += range(low, count)
            hand.next = count
            self._settle(hand)
            return
        hand.next = high = count if self._batched else low + 1
        hand.running += 1
        job = Job(hand, low, high, lane, "fine")
        self._jobs.append(job)
        if claimed:
            self.ledger.begins(self, ticket)
        elif self._hidden:
            world.at(1e-9, lambda: self._show(job, ticket))
            self._hidden = False
        else:
            self.ledger.begins(self, ticket)
            self._show(job, ticket)
        number = hand.jobs[low][0].first + hand.jobs[low][1]
        world.tell("begins", self.name, number)
        seconds = world.takes()
        if claimed:
            world.at(world.pace * 4 * world.chance.random(), lambda: self._narrow(job, ticket))
        if self._timeout is not None and world.chance.random() < world.faults.delays:
            seconds += self._timeout
        self._draw_fate(job, number, seconds)
        world.at(seconds, lambda: self._through(job))

    def _narrow(self, job: Job, ticket: int) -> None:
        """Give back what has not begun of a claim, if the job in hand has not ended meanwhile."""
        if job in self._jobs and not self.dead:
            self.page[LANES] = ticket
            self.page[CLAIMED] = ticket + 1

    def _show(self, job: Job, ticket: int) -> None:
        if job in self._jobs and not self.dead:
            word = LANES + 2 * job.lane
            self.page[word + 1] = self.world.monotonic_ns()
            self.page[word] = ticket

    def _draw_fate(self, job: Job, number: int, seconds: float) -> None:
        world, books = self.world, self.books
        drawn, faults = world.chance.random(), world.faults
        if number in books.cursed:
            drawn = 0.0 if books.cursed[number] == "kills" else faults.deaths
        if drawn < faults.deaths:
            if world.chance.random() < 0.3:
                books.cursed[number] = "kills"
            if self.page[CLAIMED] == IDLE and world.chance.random() < 0.1:  # it was its loading that killed
                self.page[DECODING] = job.hand.order.number
            world.at(seconds * 1.2 * world.chance.random(), self._die)
        elif drawn < faults.deaths + faults.failures:
            job.fate = world.chance.choice(("fails", "fails at the end"))
            if world.chance.random() < 0.3:
                books.cursed[number] = "fails"

    def _through(self, job: Job) -> None:
        """A job has come to its end."""
        if self.dead or job not in self._jobs:
            return
        self._jobs.remove(job)
        self.page[DECODING] = IDLE
        hand = job.hand
        hand.running -= 1
        try:
            self._do(job)
        except BaseException as error:  # user code: resources can't be opened
            self._break(error)
            return
        word = LANES + 2 * job.lane
        if self._lanes > 1 and self.page[word] >= 0:
            self.page[word] = past(self.page[word])
        ticket = hand.order.number + job.low
        if ticket == self.page[CLAIMED] - 1 or (self.page[CLAIMED] != IDLE and job.fate != "fine"):
            self.page[LANES] = ticket
            self.page[CLAIMED] = IDLE
        self._free.append(job.lane)
        self._settle(hand)
        self._go()

    def _settle(self, hand: InHand) -> None:
        """Answer what is through; now and then also what is not yet."""
        assert isinstance(hand.order, Chunk)
        final = hand.next >= hand.order.count and not hand.running
        if final:
            self._orders.remove(hand)
            self._answer(hand, final=True)
            if self._lanes == 1 and self.page[LANES] >= 0:
                self.page[LANES] = past(self.page[LANES])
        elif self.page[CLAIMED] != IDLE:
            return  # it looks at nothing else before the claim's end
        elif (hand.done or hand.skipped) and (self._lanes > 1 or self.world.chance.random() < 0.2):
            self._answer(hand, final=False)

    def _do(self, job: Job) -> None:
        """Have the real work do the job, unless it is to fail first."""
        hand, low = job.hand, job.low
        assert isinstance(hand.order, Chunk)
        part, offset = hand.jobs[low]
        number = part.first + offset
        answers: list[Answer] = []
        if job.fate != "fails":
            chunk = hand.order
            if not self._batched:
                chunk = Chunk(chunk.number + low, (part.take(offset, offset + 1),), 1)
            answers = self._run(chunk, self.books, number)
        for answer in answers[:-1]:  # a long stream's parts
            hand.done.append(Done(low, low, _shifted(answer, 0 if self._batched else low)))
            self._answer(hand, final=False)
        if job.fate == "fine":
            hand.done.append(Done(low, job.high, _shifted(answers[-1], 0 if self._batched else low)))
        else:
            indices = range(low, job.high)
            failures = tuple(_injected(index, self._retriable) for index in indices)
            failed = Answer(0, True, failures=failures, totals=Totals(failed=len(failures)))
            hand.done.append(Done(low, job.high, failed))

    def _limited(self, limit: int) -> None:
        """The driver writes the limit: a job may begin just before, seen or not."""
        stopped = limit != NO_LIMIT
        race = (
            stopped and self._jobs and not self.dead and self.world.chance.random() < self.world.faults.races
        )
        unseen = race and self.world.chance.random() < 0.5
        if race and not unseen:
            self._races = True
            for job in self._jobs[: self.world.chance.randint(1, self._lanes)]:
                self._through(job)
            self._races = False
        super()._limited(limit)
        if unseen:
            self._hidden = True
            self._through(self._jobs[0])
            self._hidden = False
        if stopped:
            self.ledger.taken_back(self, max(limit, self._begun() + 1))

    def _begun(self) -> int:
        """Return the last ticket that its page shows as begun, in hand or not, or that may be."""
        if self.page[CLAIMED] != IDLE:
            return self.page[CLAIMED] - 1
        shown = [self.page[word] for word in range(LANES, len(self.page), 2)]
        return max(ticket if ticket >= 0 else past(ticket) for ticket in shown)


class ProducerWorker(FleetWorker):
    """Gives items as far as it is granted, a few at a time."""

    def __init__(self, fleet: Fleet, name: str, recipe: StageRecipe, fd: int) -> None:
        super().__init__(fleet, name, replace(recipe, flusher=False), fd)
        self.books = self.ledger.stages[recipe.stage.name]
        self._busy = False
        self._over = False
        self._given = 0

    def _go(self) -> None:
        if self.dead or self._busy or self._work is None:
            return
        if self._orders:
            self._busy = True
            self.world.at(self.world.takes() * 0.3, self._give)
        elif self._closing:
            self._end()

    def _give(self) -> None:
        """Give some items of the first grant."""
        if self.dead:
            return
        world, hand = self.world, self._orders[0]
        hand.began = hand.began or world.now
        drawn = world.chance.random()
        if drawn < world.faults.deaths * 0.3:
            self._die()
            return
        if drawn < (world.faults.deaths + world.faults.failures) * 0.3 and not self._over:
            failed = Answer(0, True, failures=(_injected(-1, False),), totals=Totals(failed=1))
            hand.done.append(Done(hand.next, hand.next, failed))
            hand.ended = self._over = True
        assert isinstance(hand.order, Grant)
        try:
            through = self._slice(hand, hand.order, world.chance.randint(1, 8))
        except BaseException as error:  # user code
            self._break(error)
            return
        self._busy = False
        if through:
            self._orders.popleft()
            self._answer(hand, final=True)
        elif world.chance.random() < 0.5:
            self._answer(hand, final=False)
        self._go()

    def _slice(self, hand: InHand, grant: Grant, count: int) -> bool:
        """Give at most *count* items; return whether the grant is through."""
        for _ in range(count):
            if self._over or self.page[LIMIT] == 0 or hand.next >= grant.count or hand.nbytes >= grant.nbytes:
                return True
            (answer,) = self._run(Grant(self._given, 1, 1 << 40), self.books, self._given)
            self._given += 1
            used = len(answer.settled) + sum(failure.index >= 0 for failure in answer.failures)
            hand.done.append(Done(hand.next, hand.next + used, _shifted(answer, hand.next)))
            hand.next += used
            hand.nbytes += sum(output.block.nbytes for output in answer.outputs)
            hand.ended = self._over = answer.ended
        return self._over or hand.next >= grant.count


class Fleet:
    """The backend of one simulated run: called with the run's plan, as a backend's class is."""

    name: ClassVar[str] = "simulated"
    own_thread: ClassVar[bool] = True
    at_work: ClassVar[bool] = False

    def __init__(self, world: World, ledger: Ledger, *, by_reference: bool) -> None:
        self.world = world
        self.ledger = ledger
        self.codec: Any = TrackingCodec(by_reference)
        self.start_method = "simulated"
        self.workers: list[FleetWorker] = []
        self._plan = Plan({})

    def __call__(self, plan: Plan) -> Fleet:
        """Take *plan*."""
        self._plan = plan
        return self

    @staticmethod
    def resolve(asked: str) -> str:  # noqa: ARG004  # there is nothing to choose
        """Return 'simulated': no process is started."""
        return "simulated"

    def start(self, name: str, recipe: str) -> FleetWorker:
        """Start a worker; now and then a replacement is refused."""
        made = self._plan.recipes[recipe]
        again = "." in name.rpartition("-")[2]
        if again and self.world.chance.random() < self.world.faults.deaths:
            self.world.tell("can't be started", name)
            raise OSError("no more processes")
        fd = 1_000_000 + len(self.workers)
        if not isinstance(made, StageRecipe):
            worker = FleetWorker(self, name, made, fd)
        elif made.stage.kind == "producer":
            worker = ProducerWorker(self, name, made, fd)
        else:
            worker = ConsumerWorker(self, name, made, fd)
        self.workers.append(worker)
        return worker

    def close(self) -> None:
        """Close what is open."""
        for worker in self.workers:
            worker.release()


# ── answers ──────────────────────────────────────────────────────────────────


def _without_limit(recipe: StageRecipe) -> Any:
    """Return the stage without its time limit, which is judged by the simulation's clock alone."""
    if recipe.stage.consumer.timeout is None:
        return recipe.stage
    return replace(recipe.stage, options=recipe.stage.consumer.model_copy(update={"timeout": None}))


def _injected(index: int, retriable: bool) -> Failure:
    return Failure(index, "error", "InjectedFailure", "injected by the simulation", "", retriable)


def _shifted(answer: Answer, by: int) -> Answer:
    """Return *answer* to an order of which its own is a part, *by* jobs from the start."""
    if not by:
        return answer
    answer.settled = tuple((low + by, high + by) for low, high in answer.settled)
    answer.filtered = tuple(index + by for index in answer.filtered)
    answer.failures = tuple(
        replace(failure, index=failure.index + by) if failure.index >= 0 else failure
        for failure in answer.failures
    )
    answer.notes = tuple((index + by, done, total) for index, done, total in answer.notes)
    for output in answer.outputs:
        parents = output.parent_indices()
        if parents is not None:
            output.parents = array("I", [parent + by for parent in parents]).tobytes()
    return answer


def _merged(hand: InHand, done: Sequence[Done], *, final: bool) -> Answer:
    """Return one answer for several jobs, as a worker makes it."""
    if len(done) == 1:  # often: it is that answer
        alone = done[0].answer
        alone.number, alone.final, alone.skipped = hand.order.number, final, tuple(hand.skipped)
        alone.ended = final and hand.ended
        return alone
    settled: list[tuple[int, int]] = []
    gathered: dict[int, tuple[list[Any], list[Tag], list[int], dict[int, list[Any]]]] = {}
    for one in done:
        own = [index for low, high in one.answer.settled for index in range(low, high)]
        for low, high in one.answer.settled:
            if settled and settled[-1][1] == low:
                settled[-1] = (settled[-1][0], high)
            else:
                settled.append((low, high))
        for output in one.answer.outputs:
            pieces, tags, parents, keys = gathered.setdefault(output.route, ([], [], [], {}))
            block: Any = output.block
            pieces += block.pieces
            tags += block.tags
            parents += output.parent_indices() or own
            for place, values in output.keys:
                keys.setdefault(place, []).extend(values)
    indices = [index for low, high in settled for index in range(low, high)]
    return Answer(
        hand.order.number,
        final,
        tuple(settled),
        tuple(index for one in done for index in one.answer.filtered),
        tuple(failure for one in done for failure in one.answer.failures),
        tuple(
            Output(
                route,
                Tracked(pieces, sum(map(_size, pieces)), tags),
                None if parents == indices else array("I", parents).tobytes(),
                tuple((place, tuple(values)) for place, values in keys.items()),
            )
            for route, (pieces, tags, parents, keys) in sorted(gathered.items())
        ),
        ended=final and hand.ended,
        notes=tuple(note for one in done for note in one.answer.notes),
        skipped=tuple(hand.skipped),
    )


def _difference(now: Totals, before: Totals) -> Totals:
    emitted = before.emitted or (0,) * len(now.emitted)
    return Totals(
        now.done - before.done,
        now.filtered - before.filtered,
        now.failed - before.failed,
        tuple(a - b for a, b in zip(now.emitted, emitted, strict=True)),
    )


def _sum(start: Totals, more: Sequence[Totals]) -> Totals:
    emitted = list(start.emitted)
    for one in more:
        emitted += [0] * (len(one.emitted) - len(emitted))
        for route, count in enumerate(one.emitted):
            emitted[route] += count
    return Totals(
        start.done + sum(one.done for one in more),
        start.filtered + sum(one.filtered for one in more),
        start.failed + sum(one.failed for one in more),
        tuple(emitted),
    )
