"""
What must hold in a simulated run, judged by what workers did and what reached whom.

Each item has a tag from the moment it is given. The ledger follows the tags: an answer that the driver has
heard, from a worker that still had the job, counts once; what it gave must reach each taker once, as one job,
which must end once: done, filtered, dead or cancelled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from jobq.backend import CLAIMED, IDLE, LANES
from jobq.driver import KILL, STOP
from jobq.testing.world import Violation, World
from jobq.wire import Answer, Chunk, Part

if TYPE_CHECKING:
    from jobq.graph import Graph, Node
    from jobq.running import Running
    from jobq.testing.fleet import ConsumerWorker, Done, FleetWorker


@dataclass(eq=False, slots=True)
class Tag:
    """
    One given item: by which job of which stage, on which route, and its place among what that run of it gave.

    ``ahead``: it travels before its job has ended (a long stream), so that a rerun may repeat it.
    """

    stage: str
    job: int
    route: int
    place: int
    run: int
    ahead: bool

    def __str__(self) -> str:
        return f"item {self.place} of {self.stage}'s job {self.job}"


@dataclass(slots=True)
class Books:
    """One stage, as seen from outside."""

    name: str
    node: Node
    waits: int | None = None  # so many jobs may be unsettled here; None: no limit that can be told
    takers: list[list[Books | None]] = field(default_factory=list)  # by route; None = results
    tags: dict[int, Tag] = field(default_factory=dict)  # by job number, once it was seen
    awaited: set[Tag] = field(default_factory=set)  # given to this stage, and not yet seen here
    holders: dict[int, FleetWorker] = field(default_factory=dict)
    ends: dict[Tag, str] = field(default_factory=dict)
    failures: Counter[int] = field(default_factory=Counter)
    charged: Counter[int] = field(default_factory=Counter)
    keys: dict[str, int] = field(default_factory=dict)
    cursed: dict[int, str] = field(default_factory=dict)  # jobs that fail, or kill, each time
    arrived: int = 0
    given: int = 0
    refused: int = 0  # dead letters of no job: a producer's failure or death, an item that can't travel
    failed: int = 0  # those of them that were answers


class Ledger:
    """Told by the workers what happens; raises `Violation` when something must not be."""

    def __init__(self, graph: Graph, world: World) -> None:
        self._world = world
        self.stages = {name: Books(name, node) for name, node in graph.nodes.items()}
        self.results: set[Tag] = set()
        self.late = 0
        self.runs = 0
        self._running: Running | None = None
        self._letters_read = 0
        for books in self.stages.values():
            books.takers = [
                [self.stages[name] for name in route.takers] or [None] for route in books.node.routes
            ]

    def watch(self, running: Running) -> None:
        """Judge this run."""
        self._running = running
        looped = {name for edge in running.graph.loops for name in edge}
        for name, books in self.stages.items():
            if books.node.stage.kind == "producer":
                continue
            options = books.node.stage.consumer
            sources = [other.node for other in self.stages.values() if books in _flat(other.takers)]
            many = any(node.signature.many and node.stage.kind == "consumer" for node in sources)
            vague = many or name in looped or name in running.driver.automatic
            if "queue_size" in options.model_fields_set and not vague:
                lanes = running.driver.scheduler.lines[name].lanes
                books.waits = max(options.queue_size, options.batch or 0) + lanes

    # ── as it happens ────────────────────────────────────────────────────────

    def sent(self, worker: ConsumerWorker, chunk: Chunk) -> None:
        """The driver gives *worker* these jobs: each must be due to be done, and be nowhere else."""
        books, options = worker.books, worker.books.node.stage.consumer
        self._read_letters()
        limit = self._running.options.failure_limit if self._running is not None else None
        if limit is not None and self._letters_read >= limit:
            raise Violation(f"{books.name}: jobs are started after {limit} dead letters (max_failures)")
        ticket = chunk.number
        for part in chunk.parts:
            block: Any = part.block
            for number, tag in enumerate(block.tags, part.first):
                self._must_be_due(books, number, tag, part)
                if not part.attempt == 1 + books.failures[number] <= 1 + options.max_retries:
                    raise Violation(
                        f"{books.name}: job {number} goes out as attempt {part.attempt} after"
                        f" {books.failures[number]} failures (max_retries={options.max_retries})"
                    )
                if not part.delivery == 1 + books.charged[number] <= options.max_deliveries:
                    raise Violation(
                        f"{books.name}: job {number} goes out as delivery {part.delivery} after"
                        f" {books.charged[number]} deaths that were its own"
                        f" (max_deliveries={options.max_deliveries})"
                    )
                key = part.keys[number - part.first] if part.keys is not None else None
                if key is not None and books.keys.setdefault(key, number) != number:
                    raise Violation(
                        f"{books.name}: jobs {books.keys[key]} and {number} have the same key {key!r}"
                    )
                books.holders[number] = worker
                worker.held[ticket] = (number, tag, chunk.number)
                ticket += 1
        self._world.tell("is given", worker.name, [number for number, _, _ in worker.held.values()])

    @staticmethod
    def _must_be_due(books: Books, number: int, tag: Tag, part: Part) -> None:
        known = books.tags.get(number)
        if known is None:
            if tag not in books.awaited:
                raise Violation(
                    f"{books.name}: {tag} comes as job {number}, though it is not due: it came before, or the"
                    " answer that gave it did not count"
                )
            books.awaited.remove(tag)
            books.tags[number] = tag
        elif known is not tag:
            raise Violation(f"{books.name}: job {number} was {known}, and is now {tag}")
        if number in books.holders:
            raise Violation(
                f"{books.name}: job {number} is given out while {books.holders[number].name} has it:"
                " it is in two places"
            )
        if tag in books.ends:
            raise Violation(f"{books.name}: job {number} is given out again, though it is {books.ends[tag]}")
        del part

    def begins(self, worker: ConsumerWorker, ticket: int) -> None:
        """*worker* begins a job, its page and its limit being seen by all: it must be its own."""
        if ticket not in worker.held:
            raise Violation(f"{worker.name} begins its job {ticket}, which the driver took back")

    def taken_back(self, worker: ConsumerWorker, ticket: int) -> None:
        """The driver has kept *worker* from what it has not begun: others may have it from now on."""
        batch = worker.books.node.signature.batched  # one call: it has begun, or has not
        back = [one for one, (_, _, chunk) in worker.held.items() if (chunk if batch else one) >= ticket]
        for one in back:
            number = worker.held.pop(one)[0]
            del worker.books.holders[number]
            self._world.tell("is taken back from", worker.name, number)

    def killed(self, worker: FleetWorker) -> None:
        """The driver stops *worker*: are jobs of its over their time limit?"""
        books = getattr(worker, "books", None)
        pool = self._running.driver.pools.get(books.name) if self._running is not None and books else None
        if books is None or pool is None or pool.limit is None:
            return
        now, page = self._world.monotonic_ns(), worker.page
        late = {page[word] for word in range(LANES, len(page), 2) if now - page[word + 1] >= pool.limit * 1e9}
        batch = books.node.signature.batched
        worker.over = [one for one, (_, _, chunk) in worker.held.items() if (chunk if batch else one) in late]

    def lost(self, worker: FleetWorker) -> None:
        """The driver has heard that *worker* ended: what it had is nowhere now."""
        books = getattr(worker, "books", None)
        if books is None or not worker.held:
            return
        books.failures.update(worker.held[ticket][0] for ticket in worker.over if ticket in worker.held)
        suspects = worker.suspects()
        alone = {number for _, number in suspects}
        batch = books.node.signature.batched
        driver = self._running.driver if self._running is not None else None
        blamed = not worker.killed and (driver is None or not (driver.ending.killed or driver.stops >= STOP))
        one = len(suspects) == 1 or (batch and len({chunk for chunk, _ in suspects}) == 1)
        if blamed and (one or worker.page[CLAIMED] != IDLE):  # of a claim each may have been in hand
            books.charged.update(alone)
        for number, _, _ in worker.held.values():
            del books.holders[number]
        worker.held.clear()

    def heard(self, worker: FleetWorker, answer: Answer, done: Sequence[Done]) -> None:
        """An answer is heard: what it says of jobs that *worker* still had counts, the rest is late."""
        books: Books = worker.books  # type: ignore[attr-defined]  # only those with a stage answer
        self._read_letters()
        self._world.tell("is heard", worker.name, [one.low for one in done])
        if books.node.stage.kind == "producer":
            for one in done:
                books.given += sum(high - low for low, high in one.answer.settled)
                books.failed += len(one.answer.failures)
                self._given(books, one.answer)
            return
        for one in done:
            self._judge(books, worker, answer.number, one)
        back = {answer.number + index for index in answer.skipped}
        for ticket, (number, _, chunk) in list(worker.held.items()):
            if ticket in back or (answer.final and chunk == answer.number):  # it will not begin it
                del worker.held[ticket], books.holders[number]

    def _judge(self, books: Books, worker: FleetWorker, start: int, done: Done) -> None:
        answer = done.answer
        counts = False
        for low, high in answer.settled:
            for index in range(low, high):
                held = worker.held.pop(start + index, None)
                if held is None:
                    self.late += 1
                    self._world.tell("is late", worker.name, start + index)
                    continue
                counts = True
                self._end(books, held[0], held[1], "filtered" if index in answer.filtered else "done")
        for failure in answer.failures:
            held = worker.held.pop(start + failure.index, None)
            if held is None:
                self.late += 1
                self._world.tell("is late", worker.name, start + failure.index)
                continue
            number = held[0]
            del books.holders[number]
            books.failures[number] += 1
        parents = {parent for output in answer.outputs for parent in output.parent_indices() or ()}
        if counts or (done.low == done.high and all(start + parent in worker.held for parent in parents)):
            self._given(books, answer)

    @staticmethod
    def _end(books: Books, number: int, tag: Tag, how: str) -> None:
        if tag in books.ends:
            raise Violation(f"{books.name}: job {number} is {how}, though it was {books.ends[tag]} before")
        books.ends[tag] = how
        books.holders.pop(number, None)

    def _given(self, books: Books, answer: Answer) -> None:
        for output in answer.outputs:
            block: Any = output.block
            for taker in books.takers[output.route]:
                if taker is None:
                    self.results.update(block.tags)
                    continue
                taker.awaited.update(block.tags)
                taker.arrived += block.count
                if taker.waits is not None and taker.arrived - len(taker.ends) > taker.waits:
                    self._read_letters()
                    waiting = taker.arrived - len(taker.ends)
                    if waiting > taker.waits and taker.node.stage.consumer.key is None:
                        raise Violation(
                            f"{taker.name}: {waiting} jobs wait or are in hand; queue_size and its lanes"
                            f" allow {taker.waits}"
                        )

    def _read_letters(self) -> None:
        """Take note of the jobs that were given up since."""
        assert self._running is not None
        kept = self._running.letters.kept
        while self._letters_read < len(kept):
            dead, letter = kept[self._letters_read]
            self._letters_read += 1
            books = self.stages[dead.stage]
            if dead.part is None:
                books.refused += 1
                continue
            number = dead.part.first
            block: Any = dead.part.block
            tag = block.tags[0]
            self._world.tell("is dead", f"{dead.stage} job", number, letter.error)
            if dead.status == "cancelled":
                continue
            self._must_have_had_its_chances(books, number, dead.failure.verdict, dead.failure.retriable)
            books.awaited.discard(tag)
            books.tags.setdefault(number, tag)
            self._end(books, number, tag, "dead")

    @staticmethod
    def _must_have_had_its_chances(books: Books, number: int, verdict: str, retriable: bool) -> None:
        options = books.node.stage.consumer
        if verdict == "lost" and books.charged[number] < options.max_deliveries:
            raise Violation(
                f"{books.name}: job {number} is given up after {books.charged[number]} deaths that were"
                f" its own (max_deliveries={options.max_deliveries})"
            )
        if verdict == "error" and retriable and books.failures[number] < options.max_retries:
            raise Violation(
                f"{books.name}: job {number} is given up after {books.failures[number]} failures"
                f" (max_retries={options.max_retries})"
            )

    # ── when it is over ──────────────────────────────────────────────────────

    def close(self) -> None:
        """Judge the whole: every item has come to one end, in order, and the driver's counts say the same."""
        assert self._running is not None
        driver = self._running.driver
        self._read_letters()
        cancelled = 0
        for one in driver.cancelled:
            for part in one.parts:
                block: Any = part.block
                for number, tag in enumerate(block.tags, part.first):
                    books = self.stages[one.stage]
                    if tag not in books.awaited and books.tags.get(number) is not tag:
                        raise Violation(f"{books.name}: {tag}, cancelled as job {number}, is not due")
                    books.awaited.discard(tag)
                    self._end(books, number, tag, "cancelled")
                    cancelled += 1
        ending = driver.ending
        if cancelled and not (ending.level >= STOP or ending.halted or ending.gave_up):
            raise Violation(f"{cancelled} jobs are cancelled, though nobody asked for that")
        for violation in self._left_open():
            raise Violation(violation)

    def _left_open(self) -> Iterator[str]:
        assert self._running is not None
        driver, counts = self._running.driver, self._running.driver.counts()
        for name, books in self.stages.items():
            count = counts[name]
            lost = [tag for tag in books.tags.values() if tag not in books.ends]
            dropped = [tag for tag in books.awaited if self._may_be_dropped(tag)]
            lost += [tag for tag in books.awaited if tag not in dropped]
            if len(lost) != count.duplicates:
                yield f"{name}: {_some(lost)} never came to an end ({count.duplicates} duplicates)"
            ends = Counter(books.ends.values())
            producer = books.node.stage.kind == "producer"
            seen = {
                "received": books.given + books.refused if producer else books.arrived - len(dropped),
                "done": books.given + ends["done"],
                "filtered": ends["filtered"] + count.duplicates,
                "dead": ends["dead"] + max(books.refused, books.failed),
                "cancelled": ends["cancelled"],
            }
            wrong = [
                f"{what}: {getattr(count, what)} instead of {number}"
                for what, number in seen.items()
                if getattr(count, what) != number
            ]
            if wrong:
                yield f"{name}: the driver's counts differ from what happened: {', '.join(wrong)}"
            yield from self._out_of_order(books)
        yield from self._wrong_results()
        if driver.ending.level < KILL and (imbalance := driver.imbalance()) is not None:
            yield f"the books don't balance: {imbalance}"

    def _wrong_results(self) -> Iterator[str]:
        assert self._running is not None
        sink: Any = self._running.sink
        came = [tag for block in sink.kept for tag in block.tags]
        twice = [tag for tag, times in Counter(came).items() if times > 1]
        if twice:
            yield f"results: {_some(twice)} came more than once"
        if strange := set(came) - self.results:
            yield f"results: {_some(strange)} came, though the answer that gave it did not count"
        if lost := {tag for tag in self.results - set(came) if not self._may_be_dropped(tag)}:
            yield f"results: {_some(lost)} never came"
        for source in self.stages.values():
            if _is_ordered(source):
                yield from _disorder(source, "results", [tag for tag in came if tag.stage == source.name])

    def _may_be_dropped(self, tag: Tag) -> bool:
        """What a job gave ahead may be held until it has failed, and is dropped then."""
        source = self.stages[tag.stage]
        return tag.ahead and _is_ordered(source) and source.failures[tag.job] > 0

    def _out_of_order(self, books: Books) -> Iterator[str]:
        for source in self.stages.values():
            if _is_ordered(source) and books in _flat(source.takers):
                tags = [tag for _, tag in sorted(books.tags.items()) if tag.stage == source.name]
                yield from _disorder(source, books.name, tags)


def _is_ordered(books: Books) -> bool:
    return books.node.stage.kind == "consumer" and books.node.stage.consumer.ordered


def _disorder(source: Books, where: str, tags: Sequence[Tag]) -> Iterator[str]:
    for before, after in pairwise(tags):
        rerun = before.run != after.run
        if before.job > after.job or (before.job == after.job and not rerun and before.place >= after.place):
            yield f"{where}: {after} comes after {before}, though {source.name} is ordered"
            return


def _flat(takers: Sequence[Sequence[Books | None]]) -> list[Books]:
    return [taker for some in takers for taker in some if taker is not None]


def _some(tags: Sequence[Tag] | set[Tag]) -> str:
    shown = sorted(map(str, tags))[:3]
    more = f" and {len(tags) - len(shown)} more" if len(tags) > len(shown) else ""
    return ", ".join(shown) + more
