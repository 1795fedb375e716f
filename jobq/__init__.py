"""
jobq: typed producers and consumers on multiprocessing queues; nothing lost, nothing hangs.

    pipeline = Pipeline("name")      declare: @pipeline.producer, @pipeline.consumer, @pipeline.resource
    pipeline.run()                   run to the end, get a Report
    pipeline.stream()                iterate over results as they come
    pipeline.open()                  feed it item by item, get futures
    jobq.map(function, items)        the one-liner
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobq.errors import (
        BackendUnavailable,
        JobqError,
        JobsFailed,
        JobsLost,
        JoinTimeout,
        PayloadError,
        PipelineError,
        Reject,
        Retry,
        RunFailed,
        Skip,
        TimeLimitExceeded,
        WorkerLost,
    )
    from jobq.locks import Lock, Semaphore
    from jobq.mapping import map  # noqa: A004  # the contract's name
    from jobq.pipeline import Pipeline
    from jobq.report import DeadLetter, Report
    from jobq.stage import Job, Shard

__all__ = [
    "BackendUnavailable",
    "DeadLetter",
    "Job",
    "JobqError",
    "JobsFailed",
    "JobsLost",
    "JoinTimeout",
    "Lock",
    "PayloadError",
    "Pipeline",
    "PipelineError",
    "Reject",
    "Report",
    "Retry",
    "RunFailed",
    "Semaphore",
    "Shard",
    "Skip",
    "TimeLimitExceeded",
    "WorkerLost",
    "map",
]

#: Where the public names are that are not errors.
_HOMES = {
    "Lock": "jobq.locks",
    "Semaphore": "jobq.locks",
    "map": "jobq.mapping",
    "Pipeline": "jobq.pipeline",
    "DeadLetter": "jobq.report",
    "Report": "jobq.report",
    "Job": "jobq.stage",
    "Shard": "jobq.stage",
}

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        """Import a public name when it is first asked for: ``jobq --help`` needs not wait for pydantic."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOMES.get(name, "jobq.errors")), name)
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
