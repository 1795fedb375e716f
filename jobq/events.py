"""
What happened, told once, from the driver's thread.

Every observer (log, progress, report, tests) is a fold over this stream. Events are facts: nobody
answers one, and an observer that raises is removed, never the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from jobq.report import DeadLetter, StageCounts


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run has passed its check; no worker exists yet."""

    run: str
    pipeline: str
    backend: str
    start_method: str
    stages: tuple[str, ...]
    wanted: str | None = None  # the default backend, where it can't be had


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """A worker has been asked for (``pid`` is None where a backend has no processes)."""

    stage: str
    worker: str
    pid: int | None


@dataclass(frozen=True, slots=True)
class WorkerLostEvent:
    """
    A worker ended without having been told to; its unfinished jobs go to others.

    ``delivery`` is the number of the next delivery of what was in hand, if there is one.
    """

    stage: str
    worker: str
    pid: int | None
    reason: str
    in_hand: tuple[int, ...]
    put_back: int
    delivery: int | None = None
    max_deliveries: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """A worker ended as told. ``why`` is not empty where another takes its place while the run goes on."""

    stage: str
    worker: str
    pid: int | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class JobRetried:
    """A job failed and will be tried again, ``delay`` seconds from now."""

    stage: str
    worker: str
    job: int
    attempt: int
    error: str
    message: str
    delay: float


@dataclass(frozen=True, slots=True)
class JobDead:
    """
    A job was given up; the letter holds everything known of it.

    Its item as JSON where it has that form, else pickled: both were made where the item was. ``undecoded``:
    it died with its worker, so its item is to be had only when the run is over (a second event, for files).
    """

    worker: str
    letter: DeadLetter
    item_json: str | None = None
    item_pickle: bytes | None = None
    undecoded: bool = False


@dataclass(frozen=True, slots=True)
class ProducerEnded:
    """A producer has given its last item."""

    stage: str
    worker: str
    given: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A job said how far it is (``job.progress``), or a producer how many will come (``job.total``)."""

    stage: str
    worker: str
    job: int | None
    done: float | None
    total: float | None


@dataclass(frozen=True, slots=True)
class Tick:
    """The state of every stage, about ten times a second while somebody listens to ticks."""

    seconds: float
    stages: dict[str, StageCounts]


@dataclass(frozen=True, slots=True)
class Stopping:
    """
    The run was asked to stop: 1 = no new items, 2 = stop jobs in flight, 3 = kill.

    ``seconds``: the next step is taken then, if it is not asked for before.
    """

    level: int
    reason: str
    unfinished: int
    workers: int = 0
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RunEnded:
    """Everything is settled and every worker is gone."""

    run: str
    seconds: float
    stages: dict[str, StageCounts] = field(default_factory=dict)


Event: TypeAlias = (
    RunStarted
    | WorkerStarted
    | WorkerLostEvent
    | WorkerEnded
    | JobRetried
    | JobDead
    | ProducerEnded
    | Progress
    | Tick
    | Stopping
    | RunEnded
)

Observer: TypeAlias = Callable[[Event], None]
