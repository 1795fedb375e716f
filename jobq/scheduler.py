"""
The books: what is queued, in flight and due at every stage, and what happens next to each job.

    accept ──> waiting ──take──> flight ──settle──> done, filtered ──> outputs: accept at the takers
                  ^                 │
                  ├── take_back ────┤ (not begun, and somebody is free)
                  ├── lost ─────────┤ (the worker died)
                  └── due <─ delayed ─ (failed, to be tried again)        or: dead

Pure: no input or output, no clock of its own, no decoding of items. A `Chunk` is the unit of its work;
single jobs appear only where something happened to one of them.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from jobq.errors import TimeLimitExceeded
from jobq.lineage import Lineage
from jobq.ordering import Sequencer
from jobq.policy import Uniform, retry_delay
from jobq.wire import CHUNK_BYTES, Answer, Block, Chunk, Failure, Grant, Output, Part

if TYPE_CHECKING:
    from jobq.graph import Graph, Node

Ranges = list[tuple[int, int]]

#: Never more jobs in a chunk, whatever their size: waking an idle core takes as long as a thousand tiny jobs.
CHUNK_JOBS = 16384
#: A chunk should take about so many seconds: long beside its transport, short beside a person.
CHUNK_SECONDS = 0.02
#: Jobs that take less in all aren't worth sharing out where a part of their block carries all its bytes.
SHARE_SECONDS = 0.0003


@dataclass(slots=True)
class Flight:
    """A chunk at a worker. ``open`` are the index ranges that are neither settled nor taken back."""

    chunk: Chunk
    open: Ranges
    starts: list[int]
    solo: bool = False

    def spans(self, low: int, high: int) -> Iterable[tuple[Part, int, int]]:
        """Yield ``(part, low, high)`` of every part that holds some of the jobs ``low <= index < high``."""
        at = bisect_left(self.starts, low + 1) - 1
        while low < high:
            part, start = self.chunk.parts[at], self.starts[at]
            stop = min(high, start + part.block.count)
            yield part, low - start, stop - start
            low, at = stop, at + 1

    def parts(self, ranges: Sequence[tuple[int, int]]) -> list[Part]:
        """Return the jobs of *ranges* as parts."""
        if len(ranges) == 1 and ranges[0] == (0, self.chunk.count):  # nearly always
            return list(self.chunk.parts)
        return [part.take(a, b) for low, high in ranges for part, a, b in self.spans(low, high)]

    def job(self, index: int) -> Part:
        """Return one job."""
        return self.parts([(index, index + 1)])[0]

    def roots(self, indices: Iterable[int]) -> tuple[int, ...]:
        """Return the source items that jobs descend from, where these are followed."""
        if len(self.chunk.parts) == 1:
            roots = self.chunk.parts[0].roots or ()
            return tuple([roots[index] for index in indices])
        return tuple([(self.job(index).roots or (-1,))[0] for index in indices])

    def close(self, low: int, high: int) -> Ranges:
        """Take ``low <= index < high`` out of ``open``; return those that were open."""
        if self.open and self.open[0][0] == low and high <= self.open[0][1]:  # nearly always
            end = self.open[0][1]
            if high == end:
                del self.open[0]
            else:
                self.open[0] = (high, end)
            return [(low, high)]
        left: Ranges = []
        closed: Ranges = []
        for a, b in self.open:
            inner = (max(a, low), min(b, high))
            if inner[0] >= inner[1]:
                left.append((a, b))
                continue
            closed.append(inner)
            left += [piece for piece in ((a, inner[0]), (inner[1], b)) if piece[0] < piece[1]]
        self.open = left
        return closed


@dataclass(slots=True)
class GrantFlight:
    """Leave to give items that a producer's worker holds: so many of them are still to come."""

    grant: Grant
    left: int


@dataclass(frozen=True, slots=True)
class Retried:
    """A job failed and waits for its next attempt."""

    stage: str
    worker: str
    part: Part
    failure: Failure
    delay: float


@dataclass(frozen=True, slots=True)
class Dead:
    """
    A job was given up. ``part`` is None where a producer failed, or gave what can't be an item (then
    ``number`` is its place). ``loadable`` is False where loading the item may have killed its worker.
    """

    stage: str
    worker: str
    part: Part | None
    failure: Failure
    status: str = "dead"
    loadable: bool = True
    number: int | None = None


@dataclass(slots=True)
class Edge:
    """What went along one edge, as the driver saw it."""

    source: str
    target: str | None
    route: int
    received: int = 0


@dataclass(slots=True)
class Books:
    """A stage's counts, as the driver keeps them. ``late`` were answered twice and counted once."""

    received: int = 0
    done: int = 0
    filtered: int = 0
    duplicates: int = 0
    dead: int = 0
    cancelled: int = 0
    emitted: int = 0
    retried: int = 0
    redelivered: int = 0
    failed: int = 0
    late_done: int = 0
    late_filtered: int = 0
    late_failed: int = 0
    late_emitted: dict[int, int] = field(default_factory=dict)
    busy_seconds: float = 0.0


@dataclass(slots=True)
class Line:
    """One stage: what waits before it, what its workers have, what it gave."""

    name: str
    node: Node
    lanes: int
    each: int  # lanes of one worker
    takers: list[list[Line | None]] = field(default_factory=list)  # by route; None = results
    edges: list[list[Edge]] = field(default_factory=list)  # likewise
    ahead: list[Line] = field(default_factory=list)  # takers that may hold this stage back
    gives_results: bool = False
    rivals: list[Line] = field(default_factory=list)  # producers that share takers with this one
    before: set[str] = field(default_factory=set)  # every stage from which an item can come here
    waiting: deque[Part] = field(default_factory=deque)
    solo: deque[Part] = field(default_factory=deque)
    groups: deque[list[Part]] = field(default_factory=deque)  # batches that are tried again whole
    delayed: list[tuple[float, int, list[Part]]] = field(default_factory=list)
    queued: int = 0  # jobs in waiting, solo, groups and delayed
    queued_bytes: int = 0
    resting: int = 0  # jobs in delayed
    flying: int = 0
    flying_bytes: int = 0
    promised: int = 0
    promised_bytes: int = 0
    next_number: int = 0
    begun: int = 0  # at an ordered stage: jobs with lower numbers have been in flight
    oldest: float | None = None  # since when something waits for a batch to fill
    seen_at: float = 0.0  # when something last arrived
    service: float | None = None  # seconds a job, moving average
    target: int = 1  # jobs that a chunk should have
    producing: int = 0  # workers of a producer that have not ended
    ended: set[str] = field(default_factory=set)  # those that have
    books: Books = field(default_factory=Books)
    seen: set[str] = field(default_factory=set)
    flights: dict[str, dict[int, Flight]] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)  # jobs in flight, by worker
    grants: dict[str, dict[int, GrantFlight]] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)  # tickets given out, by worker
    sequencer: Sequencer[tuple[Output, tuple[int, ...] | None]] | None = None
    # What is read of the declaration at every step:
    is_producer: bool = field(init=False)  # no inputs
    batch: int | None = field(init=False, default=None)  # items of one call, if the stage takes lists
    rate: float | None = field(init=False, default=None)  # calls a second, at most
    queue_size: int = field(init=False, default=0)  # what may wait; 0 at a producer
    queue_bytes: int = field(init=False, default=0)
    size_is_given: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.is_producer = self.node.stage.kind == "producer"
        if not self.is_producer:
            options = self.node.stage.consumer
            self.batch = options.batch
            self.rate = options.rate
            self.queue_size = max(options.queue_size, options.batch or 0)
            self.queue_bytes = options.queue_bytes
            self.size_is_given = "queue_size" in options.model_fields_set

    def count_queued(self, parts: Iterable[Part]) -> None:
        """Count *parts* as queued."""
        for part in parts:
            self.queued += part.block.count
            self.queued_bytes += part.block.nbytes

    @property
    def room(self) -> int:
        """
        How many more jobs may be on their way here; may be negative.

        A queue size that the user chose is meant to the letter: so many may wait, besides those in hand. By
        default a worker's chunk in hand, and the next, don't count: they are through in a few milliseconds.
        """
        if self.size_is_given:
            in_hand = sum([min(self.each, load) for load in self.loads.values()])
        else:
            in_hand = max(self.lanes, 2 * self.lanes * self.target)
        return self.queue_size + in_hand - self.queued - self.flying - self.promised

    @property
    def room_bytes(self) -> int:
        """How many more bytes may be on their way here; may be negative."""
        return self.queue_bytes - self.queued_bytes - self.flying_bytes - self.promised_bytes

    @property
    def ready(self) -> int:
        """How many jobs are queued and could start now."""
        return self.queued - self.resting

    @property
    def unsettled(self) -> int:
        """How many jobs are queued or in flight."""
        return self.queued + self.flying


class Scheduler:
    """Every stage's books, and the moves between them; the driver empties `happened` and `results`."""

    def __init__(self, graph: Graph, workers: dict[str, int], lanes: dict[str, int], chance: Uniform) -> None:
        self._chance = chance
        self._serial = 0
        self.lines = {
            name: Line(name, node, workers[name] * lanes[name], lanes[name])
            for name, node in graph.nodes.items()
        }
        self.edges: list[Edge] = []
        self.happened: list[Retried | Dead] = []
        self.results: list[tuple[str, Block]] = []
        self.lineage = Lineage()
        self.fed = False  # items come from outside
        self.results_room: Callable[[], int] = lambda: CHUNK_JOBS
        self._results_promised = 0
        for line in self.lines.values():
            self._wire(line, graph)
        before = _before(self.lines)
        for line in self.lines.values():
            line.before = before[line.name]
            if line.is_producer:
                line.producing = workers[line.name]
                sharing = {name for taker in line.ahead for name in before[taker.name]} | {line.name}
                line.rivals = [other for other in self.lines.values() if other.name in sharing]
            elif line.node.stage.consumer.ordered:
                line.sequencer = Sequencer()

    def _wire(self, line: Line, graph: Graph) -> None:
        for number, route in enumerate(line.node.routes):
            takers: list[Line | None] = [self.lines[name] for name in route.takers] or [None]
            edges = [Edge(line.name, taker.name if taker else None, number) for taker in takers]
            self.edges += edges
            line.takers.append(takers)
            line.edges.append(edges)
        line.ahead = [
            self.lines[target]
            for target in dict.fromkeys(edge.target for edge in self.edges if edge.source == line.name)
            if target is not None and (line.name, target) not in graph.loops
        ]
        line.gives_results = any(None in takers for takers in line.takers)

    # ── items arrive ─────────────────────────────────────────────────────────

    def emit(self, line: Line, output: Output, roots: tuple[int, ...] | None, now: float) -> None:
        """Give *output* of a stage to everyone who takes its route."""
        count = output.block.count
        line.books.emitted += count
        keys = dict(output.keys)
        for place, (taker, edge) in enumerate(
            zip(line.takers[output.route], line.edges[output.route], strict=True)
        ):
            edge.received += count
            if taker is None:
                self.results.append((line.name, output.block))
                if roots is not None:
                    self.lineage.gave(roots, output.block)
            else:
                self.accept(taker, output.block, keys.get(place), roots, now)

    def accept(
        self,
        line: Line,
        block: Block,
        keys: tuple[str, ...] | None,
        roots: tuple[int, ...] | None,
        now: float,
    ) -> None:
        """Queue a block's items as jobs of *line*; items whose key was seen before are filtered."""
        line.books.received += block.count
        if keys is None:
            self._enqueue(line, block, None, roots, now)
            return
        start = None
        for index, key in enumerate((*keys, None)):
            new = isinstance(key, str) and key not in line.seen
            if isinstance(key, tuple):
                root = roots[index : index + 1] if roots is not None else None
                self._without_key(line, block.take(index, index + 1), root, key[1])
            elif new and key is not None:
                line.seen.add(key)
            elif key is not None:
                line.books.filtered += 1
                line.books.duplicates += 1
            if new and start is None:
                start = index
            elif not new and start is not None:
                part_roots = roots[start:index] if roots is not None else None
                self._enqueue(line, block.take(start, index), keys[start:index], part_roots, now)
                start = None

    def _enqueue(
        self,
        line: Line,
        block: Block,
        keys: tuple[str, ...] | None,
        roots: tuple[int, ...] | None,
        now: float,
    ) -> None:
        part = Part(line.next_number, block, 1, 1, keys, roots)
        if roots is not None:
            self.lineage.add(roots)
        line.next_number += block.count
        line.waiting.append(part)
        line.queued += block.count
        line.queued_bytes += block.nbytes
        line.seen_at = now
        if line.oldest is None:
            line.oldest = now

    def _without_key(self, line: Line, block: Block, roots: tuple[int, ...] | None, why: str) -> None:
        """Make a dead letter of an item whose key could not be computed."""
        failure = Failure(0, "payload", "PayloadError", f"{line.name}(): {why}", "")
        part = Part(line.next_number, block, roots=roots)
        if roots is not None:
            self.lineage.add(roots)
        line.next_number += 1
        if line.sequencer is not None:
            self._promise(line, 1)  # taken back when its turn has come
        self._bury(line, "", part, failure)

    def put_back(self, line: Line, parts: Sequence[Part], *, solo: bool = False) -> None:
        """Queue *parts* again, before everything else, in order."""
        queue = line.solo if solo else line.waiting
        queue.extendleft(reversed(parts))
        if line.sequencer is not None and not solo:
            line.waiting = deque(sorted(queue, key=lambda part: part.first))
        if line.oldest is None:
            line.oldest = line.seen_at
        line.count_queued(parts)

    def submit(
        self,
        takers: Sequence[tuple[Line, tuple[str, ...] | None]],
        block: Block,
        roots: tuple[int, ...] | None,
        now: float,
    ) -> None:
        """Queue items that came from outside at each of *takers*, and follow them if they have numbers."""
        self.lineage.begin(roots or ())
        for line, keys in takers:
            self.accept(line, block, keys, roots, now)
        self.lineage.end(roots or (), counts=False)

    def withdraw(self, root: int) -> bool:
        """Cancel a source item if no job of it has begun, and all wait here; return whether it went."""
        found = [
            (line, part)
            for line in self.lines.values()
            for part in line.waiting
            if part.roots is not None and root in part.roots and part.attempt == part.delivery == 1
        ]
        if not found or len(found) != self.lineage.untouched(root):
            return False
        for line, part in found:
            self._take_out(line, part, root)
        self.lineage.cancelled([root] * len(found))
        return True

    def _take_out(self, line: Line, part: Part, root: int) -> None:
        """Take the job of *root* out of a part that waits."""
        assert part.roots is not None
        index = part.roots.index(root)
        gone = part.take(index, index + 1)
        rest = [part.take(0, index), part.take(index + 1, part.block.count)]
        place = next(place for place, one in enumerate(line.waiting) if one is part)
        del line.waiting[place]
        for piece in reversed([piece for piece in rest if piece.block.count]):
            line.waiting.insert(place, piece)
        line.queued -= 1
        line.queued_bytes -= gone.block.nbytes
        line.books.cancelled += 1
        if line.sequencer is not None:
            line.sequencer.settle(gone.first, 1)
            self._promise(line, 1 if gone.first >= line.begun else 0)

    # ── jobs are given out ───────────────────────────────────────────────────

    def startable(self, line: Line) -> int:
        """Return how many jobs of *line* may start now, as far as the stages after it have room."""
        room = CHUNK_JOBS
        for taker in line.ahead:
            room = min(room, taker.room if taker.room_bytes > 0 else 0)
        if line.gives_results:
            room = min(room, self.results_room() - self._results_promised)
        if line.sequencer is not None:
            # What a job gives is held until all before it are settled: so many may be on their way.
            window = max(line.node.stage.consumer.queue_size, line.lanes)
            queue = line.solo or (line.groups[0] if line.groups else line.waiting)
            if queue and queue[0].first < line.begun:
                return queue[0].block.count  # tried again: what it may give has its place already
            if queue:
                room = min(room, line.sequencer.head + window - queue[0].first)
        return max(0, room)

    def take(self, line: Line, worker: str, limit: int) -> Chunk | None:
        """
        Return a chunk of at most *limit* jobs for *worker*, now in flight; None if there is none to give.

        A job that is tried alone (`solo`) travels alone, to a worker that has nothing else.
        """
        room = self.startable(line)
        limit = min(limit, room)
        if limit <= 0:
            return None
        flights = line.flights.setdefault(worker, {})
        if flights and any(flight.solo for flight in flights.values()):
            return None
        solo = bool(line.solo)
        if solo:
            if flights:
                return None
            parts = [self._cut(line.solo, 1)]
        elif line.groups:
            parts = line.groups.popleft()
        else:
            parts = self._gather(line, limit, room)
        if not parts:
            return None
        count = sum([part.block.count for part in parts])
        nbytes = sum([part.block.nbytes for part in parts])
        number = line.sent.get(worker, 0)
        line.sent[worker] = number + count
        chunk = Chunk(number, tuple(parts), count)
        starts = [0, *accumulate([part.block.count for part in parts[:-1]])]
        flights[number] = Flight(chunk, [(0, count)], starts, solo)
        line.queued -= count
        line.queued_bytes -= nbytes
        line.flying += count
        line.flying_bytes += nbytes
        line.loads[worker] = line.loads.get(worker, 0) + count
        if line.sequencer is None:
            self._promise(line, count)
        elif parts[-1].first >= line.begun:
            line.begun = parts[-1].first + parts[-1].block.count
            self._promise(line, count)
        return chunk

    def _gather(self, line: Line, limit: int, room: int) -> list[Part]:
        """Return about *limit* jobs, never more than *room*, from the head of what waits."""
        parts: list[Part] = []
        weight = 0
        while limit > 0 and line.waiting:
            head = line.waiting[0]
            size = head.block.weight
            fits = limit
            if head.block.count > limit and self._is_better_whole(line, head):
                if parts:
                    break
                fits = room
            if line.batch is None and size > CHUNK_BYTES - weight:
                share = (CHUNK_BYTES - weight) * head.block.count // size
                if share < 1 and parts:
                    break
                fits = min(limit, max(1, share))
            part = self._cut(line.waiting, fits)
            parts.append(part)
            weight += part.block.weight
            limit -= part.block.count
        if not line.waiting:
            line.oldest = None
        return parts

    @staticmethod
    def _is_better_whole(line: Line, part: Part) -> bool:
        """Whether the part's jobs take less time than it costs to have two workers decode all of them."""
        options = line.node.stage.consumer
        counted = options.batch or options.rate or options.max_tasks_per_worker
        if counted or not part.block.shared or line.service is None:
            return False
        return line.service * part.block.count < SHARE_SECONDS

    @staticmethod
    def _cut(queue: deque[Part], limit: int) -> Part:
        """Take at most *limit* jobs off the head of *queue*."""
        head = queue.popleft()
        count = head.block.count
        if count <= limit:
            return head
        queue.appendleft(head.take(limit, count))
        return head.take(0, limit)

    def _promise(self, line: Line, count: int) -> None:
        for taker in line.ahead:
            taker.promised += count
        if line.gives_results:
            self._results_promised += count

    def grant(self, line: Line, worker: str) -> Grant | None:
        """Return leave for a producer's worker to give more items, if the stages after it have room."""
        grants = line.grants.setdefault(worker, {})
        room, nbytes, wanted = self.startable(line), 1 << 40, CHUNK_JOBS
        rivals = sum([other.producing for other in line.rivals])
        for taker in line.ahead:
            nbytes = min(nbytes, taker.room_bytes)
            wanted = min(wanted, taker.target)
        if room <= 0 or (grants and room < min(wanted, CHUNK_JOBS)) or _can_wait(line, room):
            return None
        # Two grants for each rival: one that is being used and one that follows it without a pause.
        count = max(1, min(room, max(wanted, room // (2 * max(1, rivals)))))
        number = line.sent.get(worker, 0)
        line.sent[worker] = number + count
        grant = Grant(number, count, max(1, nbytes // (2 * max(1, rivals))))
        grants[number] = GrantFlight(grant, count)
        self._promise(line, count)
        for taker in line.ahead:
            taker.promised_bytes += grant.nbytes
        return grant

    # ── answers ──────────────────────────────────────────────────────────────

    def settle_grant(self, line: Line, worker: str, answer: Answer, now: float) -> None:
        """Take what a producer gave."""
        flight = line.grants[worker][answer.number]
        given = sum(high - low for low, high in answer.settled)
        books = line.books
        books.received += given
        books.done += given
        books.busy_seconds += answer.busy
        for output in answer.outputs:
            self.emit(line, output, None, now)
        for failure in answer.failures:
            books.received += 1
            books.failed += 1
            books.dead += 1
            number = answer.number + failure.index if failure.index >= 0 else None
            self.happened.append(Dead(line.name, worker, None, failure, number=number))
        used = given + sum(failure.index >= 0 for failure in answer.failures)
        flight.left -= used
        self._promise(line, -used)
        if answer.final:
            self._return_grant(line, worker, answer.number)
        if answer.ended:
            self._has_ended(line, worker)

    @staticmethod
    def _has_ended(line: Line, worker: str) -> None:
        line.ended.add(worker)
        line.producing -= 1

    def _return_grant(self, line: Line, worker: str, number: int) -> None:
        flight = line.grants[worker].pop(number)
        self._promise(line, -flight.left)
        for taker in line.ahead:
            taker.promised_bytes -= flight.grant.nbytes

    def settle(self, line: Line, worker: str, answer: Answer, now: float) -> int:
        """
        Take the outcomes of a chunk's jobs: what they gave goes on, failed ones are retried or dead.

        Jobs that the worker did not begin are queued again, unless they were taken back before: returns how
        many those were.
        """
        flight = line.flights[worker][answer.number]
        books = line.books
        books.busy_seconds += answer.busy
        closed: Ranges = []
        asked = 0
        for low, high in answer.settled:
            asked += high - low
            closed += flight.close(low, high)
        settled = sum([high - low for low, high in closed])
        outputs, filtered = answer.outputs, len(answer.filtered)
        if settled != asked:
            outputs, filtered = self._without_late(line, answer, closed, asked - settled)
        elif outputs and not asked:
            outputs = self._parts_in_time(line, flight, outputs)
        books.done += settled - filtered
        books.filtered += filtered
        self._landed(line, worker, flight, closed)
        if settled and answer.busy:
            self._learn(line, answer.busy / (settled + len(answer.failures)))
        self._pass_on(line, flight, outputs, closed, now)
        again = [part for failure in answer.failures for part in self._failed(line, worker, flight, failure)]
        if again:
            self._delay(line, again, now)
        self._release_order(line, now)
        for part in flight.parts(closed) if flight.chunk.parts[0].roots is not None else ():
            self.lineage.end(part.roots or ())
        refused = [one for index in sorted(answer.skipped) for one in flight.close(index, index + 1)]
        self._queue_again(line, worker, flight, refused)
        if answer.final:
            del line.flights[worker][answer.number]
            self._queue_again(line, worker, flight, flight.open)  # the worker says that it is through
        return len(answer.skipped) - len(refused)

    def _queue_again(self, line: Line, worker: str, flight: Flight, ranges: Ranges) -> int:
        """Queue again what a worker had and does not begin; return how many jobs."""
        if ranges:
            self._landed(line, worker, flight, ranges)
            self.put_back(line, flight.parts(ranges), solo=flight.solo)
        return sum([high - low for low, high in ranges])

    def _landed(self, line: Line, worker: str, flight: Flight, ranges: Ranges) -> None:
        """
        Take jobs out of flight.

        A job of an ordered stage keeps its place at the takers until its turn has come, even if it is tried
        again: else those that wait for it could fill the queue that it needs.
        """
        count = sum([high - low for low, high in ranges])
        if not count:
            return
        line.flying -= count
        line.loads[worker] -= count
        if count == flight.chunk.count:
            line.flying_bytes -= sum([part.block.nbytes for part in flight.chunk.parts])
        else:
            line.flying_bytes -= sum([part.block.nbytes for part in flight.parts(ranges)])
        if not line.flying:
            line.flying_bytes = 0  # parts of scalars share their body's bytes only roughly
        if line.sequencer is None:
            self._promise(line, -count)

    def _without_late(
        self, line: Line, answer: Answer, closed: Ranges, late: int
    ) -> tuple[tuple[Output, ...], int]:
        """Leave out what jobs gave that had been taken back: another worker answers for them."""
        kept = {index for low, high in closed for index in range(low, high)}
        filtered = sum(index in kept for index in answer.filtered)
        line.books.late_filtered += len(answer.filtered) - filtered
        line.books.late_done += late - (len(answer.filtered) - filtered)
        outputs = []
        for output in answer.outputs:
            parents = output.parent_indices() or array("I", _indices(answer.settled))
            pieces = [i for i, parent in enumerate(parents) if parent in kept]
            self._count_late(line, output.route, len(parents) - len(pieces))
            outputs += [
                Output(
                    output.route,
                    output.block.take(i, i + 1),
                    array("I", [parents[i]]).tobytes(),
                    tuple((place, keys[i : i + 1]) for place, keys in output.keys),
                )
                for i in pieces
            ]
        return tuple(outputs), filtered

    def _parts_in_time(self, line: Line, flight: Flight, outputs: tuple[Output, ...]) -> tuple[Output, ...]:
        """Leave out parts of a long stream whose job had been taken back: it runs, or ran, elsewhere."""
        kept = []
        for output in outputs:
            index = (output.parent_indices() or (0,))[0]
            if any(low <= index < high for low, high in flight.open):
                kept.append(output)
            else:
                self._count_late(line, output.route, output.block.count)
        return tuple(kept)

    @staticmethod
    def _count_late(line: Line, route: int, count: int) -> None:
        """Count what a worker gave and nobody gets."""
        late = line.books.late_emitted
        late[route] = late.get(route, 0) + count

    def _pass_on(
        self, line: Line, flight: Flight, outputs: Sequence[Output], closed: Ranges, now: float
    ) -> None:
        sequencer = line.sequencer
        tracked = flight.chunk.parts[0].roots is not None
        if sequencer is None and not tracked:
            for output in outputs:
                self.emit(line, output, None, now)
            return
        family = self._family(line, flight) if tracked and outputs else None
        for output in outputs:
            parents = output.parent_indices() or array("I", _indices(closed))
            roots: tuple[int, ...] | None = None
            if family is not None:
                roots = (family,) * len(parents)
            elif tracked:
                roots = flight.roots(parents)
            if sequencer is None:
                self.emit(line, output, roots, now)
                continue
            runs = _runs(parents) if output.parents is not None else _whole(flight, closed)
            for low, high in runs:
                piece = Output(
                    output.route,
                    output.block.take(low, high),
                    None,
                    tuple((place, keys[low:high]) for place, keys in output.keys),
                )
                held = roots[low:high] if roots is not None else None
                if held is not None:
                    self.lineage.add(held)
                sequencer.add(flight.job(parents[low]).first, (piece, held))
        if family is not None:
            self.lineage.forget(family)
        if sequencer is not None:
            for part in flight.parts(closed):
                sequencer.settle(part.first, part.block.count)

    def _family(self, line: Line, flight: Flight) -> int | None:
        """Return what all outputs of a batch descend from; None where each job has outputs of its own."""
        if line.batch is None:
            return None
        return self.lineage.family(root for part in flight.chunk.parts for root in part.roots or ())

    def _failed(self, line: Line, worker: str, flight: Flight, failure: Failure) -> list[tuple[float, Part]]:
        """Settle a failed job: return it with its delay if it is to be tried again."""
        closed = flight.close(failure.index, failure.index + 1)
        if not closed:
            line.books.late_failed += 1
            return []
        line.books.failed += 1
        part = flight.job(failure.index)
        if line.sequencer is not None:
            for output, held in line.sequencer.drop(part.first):
                self._count_late(line, output.route, output.block.count)
                self.lineage.end(held or ())
        delay = retry_delay(failure, part.attempt, line.node.stage.consumer, self._chance)
        self._landed(line, worker, flight, closed)
        if delay is None:
            self._bury(line, worker, part, failure)
            return []
        line.books.retried += 1
        self.happened.append(Retried(line.name, worker, part, failure, delay))
        return [(delay, replace(part, attempt=part.attempt + 1))]

    def overran(self, line: Line, worker: str, tickets: Iterable[int], seconds: float, now: float) -> None:
        """
        Let the jobs that took longer than their stage's time limit fail; their worker is being stopped.

        Of a batch, which is one call, all jobs fail. A job that has been answered meanwhile is fine.
        """
        failure = Failure(
            0,
            "error",
            "TimeLimitExceeded",
            f"the job took longer than {seconds:g} s",
            "",
            retriable=issubclass(TimeLimitExceeded, line.node.stage.consumer.retry_on),
        )
        again = []
        for number, flight in line.flights.get(worker, {}).items():
            late = {ticket - number for ticket in tickets if 0 <= ticket - number < flight.chunk.count}
            if late and line.batch is not None:
                late = set(_indices(flight.open))
            for index in sorted(late & set(_indices(flight.open))):
                # The worker will never count this failure: neither do we.
                line.books.failed -= 1
                again += self._failed(line, worker, flight, replace(failure, index=index))
        if again:
            self._delay(line, again, now)
        self._release_order(line, now)

    def _delay(self, line: Line, again: list[tuple[float, Part]], now: float) -> None:
        """Let failed jobs wait for their next attempt: those of one batch together."""
        if line.batch is not None:
            self._delay_group(line, [part for _, part in again], now + max(delay for delay, _ in again))
            return
        for delay, part in again:
            self._delay_group(line, [part], now + delay)

    def _delay_group(self, line: Line, parts: list[Part], due: float) -> None:
        self._serial += 1
        heapq.heappush(line.delayed, (due, self._serial, parts))
        line.count_queued(parts)
        line.resting += sum(part.block.count for part in parts)

    def _bury(
        self, line: Line, worker: str, part: Part | None, failure: Failure, *, loadable: bool = True
    ) -> None:
        line.books.dead += 1
        self.happened.append(Dead(line.name, worker, part, failure, loadable=loadable))
        if part is None:
            return
        if line.sequencer is not None:
            line.sequencer.settle(part.first, 1)
        if part.roots is not None:
            self.lineage.died(part.roots, failure, line.name, part)
            self.lineage.end(part.roots)

    def _learn(self, line: Line, seconds: float) -> None:
        """Let the chunk size follow the time a job takes; it grows at most fourfold at a time."""
        line.service = seconds if line.service is None else line.service * 0.7 + seconds * 0.3
        wanted = int(CHUNK_SECONDS / line.service) if line.service > 1e-9 else CHUNK_JOBS
        line.target = max(1, min(wanted, line.target * 4, CHUNK_JOBS))

    # ── workers die, jobs are taken back ─────────────────────────────────────

    def lost(
        self,
        line: Line,
        worker: str,
        in_hand: Sequence[int],
        decoding: int | None,
        reason: str,
        now: float,
    ) -> int:
        """
        Put back every job that *worker* had not answered; return how many.

        *in_hand* are the tickets that its page shows, *decoding* the number of the chunk whose items it was
        decoding. A single job (or batch) in hand is charged with the delivery, and is a dead letter past
        ``max_deliveries``. Where several can have done it, each is tried again alone: uncharged if all had
        begun, else charged as if it had been in hand, which ends when it is done.
        """
        flights = line.flights.pop(worker, {})
        line.sent.pop(worker, None)
        line.loads.setdefault(worker, 0)
        suspects = {
            number: self._suspects(line, number, flight, in_hand, decoding)
            for number, flight in flights.items()
        }
        several = sum(map(len, suspects.values())) > 1 and (
            line.batch is None or sum(map(bool, suspects.values())) > 1
        )
        max_deliveries = line.node.stage.consumer.max_deliveries  # where it is 1, no jobs are claimed
        back = 0
        for number, flight in sorted(flights.items(), reverse=True):
            open_ranges, flight.open = flight.open, []
            self._landed(line, worker, flight, open_ranges)
            suspected = suspects[number]
            claimed = several and line.each == 1 and decoding is None and max_deliveries > 1
            line.books.redelivered += min(1, len(suspected)) if claimed else len(suspected)
            if line.batch is not None:
                back += self._batch_lost(line, worker, flight.parts(open_ranges), suspected, several, reason)
                continue
            for low, high in reversed(open_ranges):
                clean = _gaps(low, high, [index for index in suspected if low <= index < high])
                self.put_back(line, flight.parts(clean), solo=flight.solo)
                back += sum(b - a for a, b in clean)
            if several:
                alone = [flight.job(index) for index in suspected]
                if claimed:
                    alone = [replace(part, delivery=part.delivery + 1) for part in alone]
                self.put_back(line, alone, solo=True)
                back += len(suspected)
            elif suspected:
                part, loadable = flight.job(suspected[0]), decoding is None
                back += self._charge(line, worker, part, reason, loadable=loadable, solo=flight.solo)
        del line.loads[worker]
        self._release_order(line, now)
        return back

    @staticmethod
    def _suspects(
        line: Line, number: int, flight: Flight, in_hand: Sequence[int], decoding: int | None
    ) -> list[int]:
        """Return the indices of the jobs that can have killed the worker."""
        indices = list(_indices(flight.open))
        if decoding == number:
            return indices
        held = {ticket - number for ticket in in_hand if 0 <= ticket - number < flight.chunk.count}
        if line.batch is not None:
            return indices if held else []
        return [index for index in indices if index in held]

    def _batch_lost(
        self, line: Line, worker: str, parts: list[Part], suspected: list[int], several: bool, reason: str
    ) -> int:
        """Put a lost batch back: whole if its call had begun, charged if nothing else can have done it."""
        if not parts:
            return 0
        if not suspected:
            self.put_back(line, parts)
            return sum(part.block.count for part in parts)
        return self._charge_batch(line, worker, parts, reason, charged=not several)

    def _charge(self, line: Line, worker: str, part: Part, reason: str, *, loadable: bool, solo: bool) -> int:
        """Count a delivery against the job that was in hand: queue it again in its place, or give it up."""
        if part.delivery >= line.node.stage.consumer.max_deliveries:
            self._bury(line, worker, part, _lost_failure(part, reason), loadable=loadable)
            return 0
        self.put_back(line, [replace(part, delivery=part.delivery + 1)], solo=solo)
        return 1

    def _charge_batch(self, line: Line, worker: str, parts: list[Part], reason: str, *, charged: bool) -> int:
        """
        Count a delivery against each job of a batch: it is tried again, less the jobs that have had theirs.

        Jobs of one batch may differ: one that had not begun when its worker died was made up anew.
        """
        group = []
        for part in parts:
            if charged and part.delivery >= line.node.stage.consumer.max_deliveries:
                for index in range(part.block.count):
                    self._bury(line, worker, part.take(index, index + 1), _lost_failure(part, reason))
            else:
                group.append(replace(part, delivery=part.delivery + charged))
        if group:
            line.groups.appendleft(group)
        line.count_queued(group)
        return sum(part.block.count for part in group)

    def _release_order(self, line: Line, now: float) -> None:
        """Give on what an ordered stage need not hold any longer."""
        if line.sequencer is None:
            return
        head = line.sequencer.head
        for output, roots in line.sequencer.release():
            self.emit(line, output, roots, now)
            self.lineage.end(roots or ())
        self._promise(line, head - line.sequencer.head)

    def lost_producer(self, line: Line, worker: str, reason: str) -> None:
        """Count a producer's death as one dead letter of its stage; what it gave stays."""
        self.end_producer(line, worker)
        line.books.received += 1
        self._bury(
            line, worker, None, Failure(-1, "lost", "WorkerLost", f"the producer's worker {reason}", "")
        )

    def end_producer(self, line: Line, worker: str) -> None:
        """Take a producer's worker as ended, if it was not yet; what it was granted is free again."""
        for number in list(line.grants.get(worker, {})):
            self._return_grant(line, worker, number)
        if worker not in line.ended:
            self._has_ended(line, worker)

    def take_back(self, line: Line, worker: str, ticket: int) -> int:
        """Queue again every job of *worker* from *ticket* on; it has been kept from beginning them."""
        back = 0
        for number, flight in sorted(line.flights.get(worker, {}).items(), reverse=True):
            if line.batch is not None and number < ticket:
                continue  # its one call has begun
            closed = flight.close(max(0, ticket - number), flight.chunk.count)
            back += self._queue_again(line, worker, flight, closed)
        return back

    def left(self, line: Line, worker: str) -> None:
        """Forget a consumer's worker that has ended with everything answered."""
        if not line.loads.get(worker):
            line.loads.pop(worker, None)
            line.flights.pop(worker, None)
            line.sent.pop(worker, None)

    # ── time and the end ─────────────────────────────────────────────────────

    def due(self, line: Line, now: float) -> None:
        """Queue the delayed jobs whose time has come."""
        while line.delayed and line.delayed[0][0] <= now:
            parts = heapq.heappop(line.delayed)[2]
            line.resting -= sum([part.block.count for part in parts])
            if line.batch is not None:
                line.groups.append(parts)
            elif line.sequencer is not None:
                line.waiting = deque(sorted([*parts, *line.waiting], key=lambda part: part.first))
            else:
                line.waiting.extend(parts)

    def next_due(self, line: Line) -> float:
        """Return when the next of the delayed jobs is due."""
        return line.delayed[0][0]

    def upstream_quiet(self, line: Line) -> bool:
        """Whether nothing can arrive at *line* before it acts itself."""
        if self.fed:
            return False
        for name in line.before:
            other = self.lines[name]
            if other.producing or (other is not line and other.unsettled) or (other is line and line.flying):
                return False
        return True

    @property
    def finished(self) -> bool:
        """Whether all producers have ended and nothing is queued or in flight."""
        return not any(line.producing or line.queued or line.flying for line in self.lines.values())

    @property
    def unfinished(self) -> int:
        """How many jobs are queued or in flight at all stages."""
        return sum(line.unsettled for line in self.lines.values())

    def cancel(self, line: Line, now: float) -> list[Part]:
        """
        Take everything that is queued or in flight at *line* out of the books as cancelled; return it.

        What an ordered stage held for jobs before it goes on.
        """
        parts = [*line.waiting, *line.solo]
        for group in (*line.groups, *(group for _, _, group in line.delayed)):
            parts += group
        line.waiting.clear()
        line.solo.clear()
        line.groups.clear()
        line.delayed.clear()
        for flights in line.flights.values():
            for flight in flights.values():
                parts += flight.parts(flight.open)
                flight.open = []
        line.flights.clear()
        line.loads.clear()
        line.queued = line.queued_bytes = line.resting = line.flying = line.flying_bytes = 0
        line.books.cancelled += sum(part.block.count for part in parts)
        if line.sequencer is not None:
            for part in parts:
                line.sequencer.settle(part.first, part.block.count)
            self._release_order(line, now)
        for part in parts:
            self.lineage.cancelled(part.roots or ())
        return parts


def _lost_failure(part: Part, reason: str) -> Failure:
    times = "once" if part.delivery == 1 else f"{part.delivery} times"
    text = f"its worker died {times} with this job in hand; the last one {reason}"
    return Failure(0, "lost", "WorkerLost", text, "")


def _indices(ranges: Iterable[tuple[int, int]]) -> Iterable[int]:
    return (index for low, high in ranges for index in range(low, high))


def _gaps(low: int, high: int, without: Sequence[int]) -> Ranges:
    """Return the ranges of ``low <= i < high`` between the indices *without*."""
    gaps, start = [], low
    for index in without:
        if start < index:
            gaps.append((start, index))
        start = index + 1
    if start < high:
        gaps.append((start, high))
    return gaps


def _runs(parents: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Yield ``(low, high)`` of each run of equal parents."""
    low = 0
    for index in range(1, len(parents) + 1):
        if index == len(parents) or parents[index] != parents[low]:
            yield low, index
            low = index


def _whole(flight: Flight, closed: Ranges) -> Iterable[tuple[int, int]]:
    """Yield ``(low, high)`` of the outputs of jobs with consecutive numbers, where each job gave one."""
    start = 0
    for low, high in closed:
        for _, a, b in flight.spans(low, high):
            yield start, start + b - a
            start += b - a


def _before(lines: dict[str, Line]) -> dict[str, set[str]]:
    """Return, for each stage, every stage from which an item can come to it."""
    sources: dict[str, set[str]] = defaultdict(set)
    for line in lines.values():
        for takers in line.takers:
            for taker in takers:
                if taker is not None:
                    sources[taker.name].add(line.name)
    before: dict[str, set[str]] = {}
    for name in lines:
        seen: set[str] = set()
        front = set(sources[name])
        while front:
            seen |= front
            front = {further for one in front for further in sources[one]} - seen
        before[name] = seen
    return before


def _can_wait(producer: Line, room: int) -> bool:
    """
    Whether all who take a producer's items have enough to do, and *room* for little more.

    Each grant costs two wake-ups, whatever its length. A queue size that the user chose is used to the full.
    """
    return bool(producer.ahead) and all(
        not taker.size_is_given
        and room < taker.queue_size // 4
        and taker.ready >= 2 * taker.lanes * max(taker.target, taker.batch or 1)
        for taker in producer.ahead
    )
