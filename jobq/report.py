"""What a run leaves behind: counts per stage and edge, results, dead letters."""

from __future__ import annotations

import datetime as dt
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class StageCounts(BaseModel):
    """
    One stage's books.

    In a finished run ``received = done + filtered + dead + cancelled`` (``filtered`` includes
    ``duplicates``). A producer receives what it gives. ``worker_restarts`` are workers that died and were
    replaced; those that were replaced by plan are not among them.
    """

    received: int = 0
    done: int = 0
    filtered: int = 0
    duplicates: int = 0
    dead: int = 0
    cancelled: int = 0
    emitted: int = 0
    retried: int = 0
    redelivered: int = 0
    worker_restarts: int = 0
    busy_seconds: float = 0.0
    queued: int = 0
    in_flight: int = 0
    workers: int = 0


class EdgeCounts(BaseModel):
    """What went along one edge; ``target`` None is the run's results."""

    source: str
    target: str | None
    emitted: int = 0
    received: int = 0


class DeadLetter(BaseModel):
    """A job that was given up ("dead"), or never came to its end because the run stopped ("cancelled")."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    run: str
    pipeline: str
    target: str | None = None
    stage: str
    job: int | None
    key: str | None = None
    item: Any = None
    item_type: str | None = None
    status: Literal["dead", "cancelled"] = "dead"
    attempts: int = 1
    deliveries: int = 1
    error: str = ""
    message: str = ""
    traceback: str = ""
    time: dt.datetime = Field(default_factory=lambda: dt.datetime.now(dt.UTC))


#: The counts of a stage that a report tells in words, in this order.
_TOLD = (
    "received",
    "done",
    "filtered",
    "dead",
    "cancelled",
    "retried",
    "redelivered",
    "worker_restarts",
)


class Report(BaseModel):
    """The whole run. ``ok`` says that nothing is dead and nothing was cancelled."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    run: str
    pipeline: str
    ok: bool
    seconds: float
    results: list[Any] = Field(default_factory=list)
    dead: list[DeadLetter] = Field(default_factory=list)
    stages: dict[str, StageCounts] = Field(default_factory=dict)
    edges: list[EdgeCounts] = Field(default_factory=list)

    def __str__(self) -> str:
        """Return how the run went, a line for each stage: no item, result or dead letter is shown."""
        results = sum(edge.received for edge in self.edges if edge.target is None)
        # The letters that are kept are not all; what could not be loaded is in no stage's count.
        letters = sum(letter.status == "dead" for letter in self.dead)
        dead = max(letters, sum(counts.dead for counts in self.stages.values()))
        ended = f"{'ok' if self.ok else 'not ok'}, {self.seconds:.1f} s"
        gave = f"{counted(results, 'result')}, {counted(dead, 'dead letter')}"
        stages = [f"  {name}: {_in_words(counts)}" for name, counts in self.stages.items()]
        return "\n".join([f"pipeline {self.pipeline!r}, run {self.run}: {ended}, {gave}", *stages])


def _in_words(counts: StageCounts) -> str:
    """Return a stage's counts in a line; of most of them only those that are not zero."""
    told = {name: getattr(counts, name) for name in _TOLD}
    return ", ".join(
        f"{count:,} {name.replace('_', ' ')}"
        for name, count in told.items()
        if count or name in ("received", "done")
    )


def counted(count: int, noun: str) -> str:
    """Return how many of what, in words."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
