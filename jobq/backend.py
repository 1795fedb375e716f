"""
The seam of a backend: how orders reach a worker and answers come back, and how a worker's death is seen.

    driver's side                                     worker's side
    ┌──────────────────┐  order (Chunk, Grant)        ┌─────────────────────┐
    │ Worker.send      │ ───────── inbox ───────────> │ Port.receive        │
    │ Worker.receive   │ <──────── outbox ─────────── │ Port.send           │
    │ Worker.page      │ <──── a few shared words ──> │ Port.page           │
    └──────────────────┘  Hello, Answer …, Bye        └─────────────────────┘

The contract, held by `jobq.testing.check_backend` against every backend:

- `Hello` comes before any answer; start-up never counts as job time.
- Every order is answered by its number, the last time with ``final``.
- Losing a worker never touches another: a channel has one writer and one reader, no lock is shared.
- `Worker.send` never waits for user code; a frame of any size is taken at once and travels as the
  worker reads.
- No worker outlives its driver by more than a second, even if the driver is killed.
- A backend never logs, retries, counts or calls upward.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, TypeAlias

from jobq.arena import NOWHERE
from jobq.errors import EndOfChannel
from jobq.wire import Answer, Codec, Order, Said

#: The page: 64-bit words that worker and driver share. Plain numbers, written by one side, read by
#: the other, so a death can leave nothing locked.
Page: TypeAlias = MutableSequence[int]

#: Word 0, the driver's: no job with this ticket or a later one may begin.
LIMIT = 0
#: Word 1, the driver's: items that the next stage likes to get together.
HINT = 1
#: Word 2, the driver's: 1 once the run is being stopped (``job.stopping``).
STOPPING = 2
#: Word 3, the worker's: the number of the chunk whose items are being decoded (user code may run), or IDLE.
DECODING = 3
#: Word 4, the worker's: where the claim ends that begins with the ticket in hand (`jobq.claims`), or IDLE.
CLAIMED = 4
#: Word 5, the driver's: which region of the arena is this worker's (`jobq.arena`), or NOWHERE.
REGION = 5
#: From word 6 on, two for each lane, the worker's: the ticket in hand, or `past` the last one, or IDLE; and
#: when it began (`time.monotonic_ns`; only where the stage has a time limit).
LANES = 6

#: Ticket in hand: nothing, and nothing was.
IDLE = -1
#: The limit word's value when nothing is taken back. Small, since it is read before each job.
NO_LIMIT = -1


def may_begin(page: Page, ticket: int) -> bool:
    """Return whether the job with this *ticket* was not taken back; its lane shows the ticket already."""
    limit = page[LIMIT]
    return limit == NO_LIMIT or ticket < limit


def past(ticket: int) -> int:
    """
    Return what a lane's word is when *ticket* is not in hand any more; the inverse of itself.

    Who takes jobs back has to know which were begun, though their answer may still be under way.
    """
    return -2 - ticket


def page_words(lanes: int) -> int:
    """Return how many words the page of a worker with so many lanes has."""
    return LANES + 2 * lanes


def blank_page(page: Page) -> None:
    """Make *page* that of a worker that has not begun."""
    page[LIMIT] = NO_LIMIT
    page[HINT] = 1
    page[STOPPING] = 0
    page[DECODING] = IDLE
    page[CLAIMED] = IDLE
    page[REGION] = NOWHERE
    for word in range(LANES, len(page), 2):
        page[word] = IDLE
        page[word + 1] = 0


class Waitable(NamedTuple):
    """A descriptor to wait for, with `selectors.EVENT_READ` or ``EVENT_WRITE`` or both."""

    fd: int
    events: int


class Port(Protocol):
    """The worker's end of its channel."""

    page: Page
    codec: Codec

    def receive(self) -> Order:
        """
        Return the next order, waiting for it.

        Raises `EndOfChannel` when the driver wants no more of this worker.
        """
        ...

    def send(self, answer: Answer) -> None:
        """Hand over one answer, whole. One thread at a time: the caller sees to that."""
        ...


class Work(Protocol):
    """What a recipe opens in the worker."""

    def run(self, order: Order) -> None:
        """
        Take *order* on; its answers go to the port, now or (with lanes) later.

        An exception that leaves here means that the worker can't work; a job's own never does.
        """
        ...

    def close(self) -> None:
        """Finish what was taken on, answer it, and release what was opened."""
        ...


class Recipe(Protocol):
    """What a worker does: opened once, in the worker. Must be picklable for forkserver and spawn."""

    @property
    def lanes(self) -> int:
        """How many jobs may be in progress at once in one worker."""
        ...

    def open(self, port: Port) -> Work:
        """Return the work, ready for its first order. User code may run."""
        ...


class Worker(Protocol):
    """The driver's end of one worker's channel."""

    name: str
    pid: int | None
    page: Page

    @property
    def waitables(self) -> tuple[Waitable, ...]:
        """
        What to wait for before calling `receive` again.

        The tuple is the same object as long as nothing changed. Includes the worker's death.
        """
        ...

    def send(self, order: Order) -> None:
        """Take *order* for delivery. Never waits; a worker that is gone is told by `receive`."""
        ...

    def receive(self) -> Said | None:
        """
        Return the next whole thing the worker said, or None if there is none yet. Never waits.

        Raises `EndOfChannel` once, after everything it said, when it ended as told (after `Bye`);
        raises `BrokenChannel` once, after every whole answer, when it was lost: the text says how
        ("was killed by SIGKILL", "exited with code 0 in the middle of its work").
        """
        ...

    def close(self) -> None:
        """Tell the worker that no more orders come: it finishes what it has, then ends."""
        ...

    def kill(self) -> None:
        """Stop the worker now. `receive` then raises one of its two ends. A thread is abandoned."""
        ...

    def release(self) -> None:
        """Give back the channel's descriptors and memory, after its end was raised. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Preload:
    """A file that a child must load, under one name, before it unpickles anything."""

    path: str
    module: str
    folder: str


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What a backend is made for: every recipe it may be asked to start, by name.

    A backend that forks does so from a process that was forked when it was made, so recipes may hold
    lambdas and closures under ``fork``. ``stdin`` names the recipes that may want the program's standard
    input: "" if their process is to have it, else why not. All other processes find theirs empty.
    ``workers`` is how many will be started at first, where a recipe may be for several; ``first`` are the
    names and recipes of those that will be asked for before any other, in this order: a backend may begin
    with them at once.
    """

    recipes: Mapping[str, Recipe]
    start_method: str = "auto"
    preload: Preload | None = None
    daemon: Mapping[str, bool] = field(default_factory=dict)
    stdin: Mapping[str, str] = field(default_factory=dict)
    workers: int = 0
    first: Sequence[tuple[str, str]] = ()


class Backend(Protocol):
    """
    Starts workers. Made by calling its class with a `Plan`; raises `BackendUnavailable` where it can't work.

    ``own_thread``: the driver may run in a thread of its own. False for a backend that runs jobs in the
    thread that waits for them; its ``at_work`` is then read by signal handlers.
    """

    name: ClassVar[str]
    own_thread: ClassVar[bool]

    @staticmethod
    def resolve(asked: str) -> str:
        """Return how workers would be started if a plan asked for the start method *asked*."""
        ...

    @property
    def codec(self) -> Codec:
        """How items become blocks here."""
        ...

    @property
    def start_method(self) -> str:
        """How workers are started in fact ("fork", "forkserver", "spawn", "thread", "inline")."""
        ...

    @property
    def at_work(self) -> bool:
        """Whether user code is running in this very thread, which `Interrupted` would end."""
        ...

    def start(self, name: str, recipe: str) -> Worker:
        """Start a worker called *name* for the plan's recipe *recipe*; don't wait for its `Hello`."""
        ...

    def close(self) -> None:
        """Kill what still runs and leave nothing behind: no process, thread, descriptor, semaphore."""
        ...


def serve(recipe: Recipe, port: Port) -> None:
    """Work in a worker until the driver wants no more, then release what was opened."""
    work = recipe.open(port)
    try:
        while True:
            try:
                order = port.receive()
            except EndOfChannel:
                break
            work.run(order)
    finally:
        work.close()


__all__: Sequence[str] = [
    "DECODING", "HINT", "IDLE", "LANES", "LIMIT", "NO_LIMIT", "STOPPING",
    "Backend", "Page", "Plan", "Port", "Preload", "Recipe", "Waitable", "Work", "Worker",
    "blank_page", "page_words", "past", "serve",
]  # fmt: skip
