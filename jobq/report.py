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


def counted(count: int, noun: str) -> str:
    """Return how many of what, in words."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
