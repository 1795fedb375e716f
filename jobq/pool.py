"""One stage's workers: start them, replace those that die or retire, give up when that leads nowhere."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jobq.backend import (
    CLAIMED,
    DECODING,
    IDLE,
    LANES,
    LIMIT,
    NO_LIMIT,
    STOPPING,
    Backend,
    Waitable,
    Worker,
    past,
)
from jobq.wire import Totals

if TYPE_CHECKING:
    from jobq.scheduler import Line

#: So many deaths in a row, with no job of the stage finished between them, and the run gives up.
CRASH_LIMIT = 5
#: A job in hand for so many seconds is slow: what waits behind it goes to a worker that is free.
SLOW_SECONDS = 0.002


#: An async job that does not end when it is cancelled is stopped with its worker, so much later.
ASYNC_GRACE_SECONDS = 1.0


@dataclass(slots=True)
class Member:
    """A worker, as its pool knows it."""

    pool: Pool
    index: int
    worker: Worker
    ready: bool = False
    closing: bool = False
    left: int | None = None  # how many jobs (or batches) it may still be sent; None: any number
    retiring: str = ""  # why it is told to end while the run goes on
    recalled: int = 0  # jobs that were taken back, and that the worker has not come past yet
    gone: bool = False
    stopped: str = ""  # by us, and why
    registered: tuple[Waitable, ...] = ()
    totals: Totals = field(default_factory=Totals)
    overdue: set[int] = field(default_factory=set)  # tickets for which it is being stopped
    sample: int = IDLE
    sampled_at: float = 0.0
    loading: int | None = None  # the chunk whose items it was loading at the last look
    loading_since: int = 0

    @property
    def load(self) -> int:
        """How many jobs it was sent and has not answered."""
        return self.pool.line.loads.get(self.worker.name, 0)

    @property
    def open(self) -> bool:
        """Whether it may be given jobs, now or when those in hand are done."""
        return self.ready and not self.closing and self.left != 0

    def tickets(self) -> list[int]:
        """Return the tickets of the jobs in hand, or that may be."""
        page = self.worker.page
        while (claimed := page[CLAIMED]) != IDLE:
            first = page[LANES]
            if page[CLAIMED] == claimed:  # else the worker has gone on between the two
                return list(range(first, claimed))
        return [ticket for ticket in (page[word] for word in range(LANES, len(page), 2)) if ticket >= 0]

    def begun(self) -> int:
        """Return the last ticket that was begun, in hand or not, or that may be; IDLE: none was."""
        page = self.worker.page
        claimed = page[CLAIMED]
        if claimed != IDLE:
            return claimed - 1
        tickets = [page[word] for word in range(LANES, len(page), 2)]
        return max([ticket if ticket >= 0 else past(ticket) for ticket in tickets])

    def ages(self, now: int) -> list[tuple[int, int]]:
        """Return the tickets in hand, and for how many nanoseconds each has been."""
        page = self.worker.page
        lanes = [(page[word], now - page[word + 1]) for word in range(LANES, len(page), 2)]
        return [(ticket, age) for ticket, age in lanes if ticket >= 0]

    def loads_since(self, now: int) -> int:
        """Return since when it was seen to load the items that it loads now, in nanoseconds."""
        loading, self.loading = self.loading, self.decoding()
        if self.loading is None or self.loading != loading:
            self.loading_since = now
        return self.loading_since

    def decoding(self) -> int | None:
        """Return the number of the chunk whose items are being decoded."""
        number = self.worker.page[DECODING]
        return None if number == IDLE else number

    @property
    def has_more_to_give_back(self) -> bool:
        """Whether jobs may be taken back besides those that were: a claim may become narrower later."""
        return not self.recalled or self.worker.page[CLAIMED] != IDLE

    def stop_beginning(self) -> int:
        """Keep the worker from beginning more jobs; return the first ticket that it will not begin."""
        page = self.worker.page
        begun, limit = self.begun(), page[LIMIT]
        # Never raised: the page may show a claim from behind the limit, just before the worker looks at that.
        page[LIMIT] = begun + 1 if limit == NO_LIMIT else min(limit, begun + 1)
        # The worker writes its ticket, then reads the limit; we write the limit, then read the ticket. A
        # system call between the two lets our store be seen first, so one of us notices the other.
        os.sched_yield()
        return max(begun, self.begun()) + 1

    def allow_all(self) -> None:
        """Lift the limit, once everything that was taken back has been answered."""
        self.recalled = 0
        self.worker.page[LIMIT] = NO_LIMIT


class Pool:
    """The workers of one stage. ``started`` is called with each new member."""

    def __init__(self, line: Line, backend: Backend, size: int, started: Callable[[Member], None]) -> None:
        self.line = line
        self.size = size
        self.members: list[Member] = []
        self.restarts = 0
        self.totals: list[Totals] = []
        self._backend = backend
        self._started = started
        self._serial = 0
        self._first = size  # so many are named by their place alone
        #: Where calls are limited to a rate: when the next may begin, and when to look for that.
        self.next_call = 0.0
        self.call_at: float | None = None
        self.look_at: float | None = None  # when a job in hand can be over its time limit
        #: Seconds after which a job's worker is stopped: an async job is cancelled by its worker first.
        timeout = None if line.is_producer else line.node.stage.consumer.timeout
        grace = ASYNC_GRACE_SECONDS if line.node.signature.is_async else 0.0
        self.limit = None if timeout is None else timeout + grace
        self._tasks = None if line.is_producer else line.node.stage.consumer.max_tasks_per_worker
        self.follows_consumers = False  # some of what comes here is given by jobs
        self.starves = False  # as these were told
        self.missing: list[int] = []  # places of workers that have ended and are not replaced yet
        self.retry_at: float | None = None
        self.deserted_at: float | None = None  # since when the system refuses the only worker
        self._deaths = 0
        self._settled_at_death = 0

    def start(self) -> None:
        """Start every worker."""
        self._first = self.size
        for index in range(self.size):
            self._start(index)

    def _start(self, index: int) -> None:
        self._serial += 1
        name = worker_name(self.line.name, index)
        if self._serial > self._first:
            name += f".{self._serial - self._first + 1}"
        recipe = recipe_name(self.line.name, index if self.line.is_producer else 0)
        worker = self._backend.start(name, recipe)
        member = Member(self, index, worker, left=self._tasks)
        self.members.append(member)
        self._started(member)

    def replace(self, index: int) -> None:
        """Start a worker in the place *index* of one that has ended."""
        self._start(index)

    def resize(self, size: int) -> None:
        """Let the stage have *size* workers; the caller starts them, or lets some go."""
        self.size = size
        self.line.lanes = self.line.each * size

    @property
    def staying(self) -> int:
        """How many workers there are, or will be once those missing are replaced."""
        return len(self.missing) + sum(not member.retiring for member in self.members)

    def miss(self, count: int) -> None:
        """Take *count* workers as missing, each in a place that is free."""
        taken = {*self.missing, *(member.index for member in self.members if not member.retiring)}
        free = (index for index in itertools.count() if index not in taken)
        self.missing += reversed(list(itertools.islice(free, count)))  # the last is filled first

    def remove(self, member: Member) -> None:
        """Forget a worker that has ended; its counts stay."""
        member.gone = True
        self.totals.append(member.totals)
        self.members.remove(member)

    @property
    def finished(self) -> int:
        """How many calls of the stage's function have come to an end."""
        books = self.line.books
        return books.done + books.filtered + books.dead + books.retried

    def died(self) -> int:
        """
        Count a death with no job in hand; return how many came in a row without a job finished between.

        Deaths with a job in hand end by themselves, at the job's ``max_deliveries``.
        """
        finished = self.finished
        self._deaths = self._deaths + 1 if finished == self._settled_at_death else 1
        self._settled_at_death = finished
        return self._deaths

    def stop_giving(self) -> None:
        """Let producers end at their next yield, and say to all that the run is being stopped."""
        for member in self.members:
            member.worker.page[STOPPING] = 1
            if self.line.is_producer:
                member.worker.page[LIMIT] = 0

    def stop(self, why: str) -> None:
        """Stop every worker now, and say so."""
        for member in self.members:
            member.stopped = f"was stopped: {why}"
        self.kill()

    def kill(self) -> None:
        """Stop every worker now."""
        for member in self.members:
            member.worker.kill()


def describe_lack(error: OSError) -> str:
    """Return a sentence that says which limit keeps a worker from being started."""
    limit = {errno.EMFILE: " (ulimit -n)", errno.EAGAIN: " (ulimit -u)"}.get(error.errno or 0, "")
    return f"no worker can be started: {error.strerror or error}{limit}"


def worker_name(stage: str, index: int) -> str:
    """Return the name of a stage's first worker in the place *index*."""
    return f"{stage}-{index + 1}"


def first_workers(sizes: Mapping[str, int], producers: Container[str]) -> Iterator[tuple[str, str]]:
    """Yield names and recipes of the workers that pools of these sizes start, in their order."""
    for stage, size in sizes.items():
        for index in range(size):
            yield worker_name(stage, index), recipe_name(stage, index if stage in producers else 0)


def recipe_name(stage: str, index: int) -> str:
    """Return the name of the recipe for worker *index* of a producer, whose shards differ; else 0 has all."""
    return f"{stage}/{index}"
