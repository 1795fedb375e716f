"""
jobq: typed producers and consumers on multiprocessing queues; nothing lost, nothing hangs.

    pipeline = Pipeline("name")      declare: @pipeline.producer, @pipeline.consumer, @pipeline.resource
    pipeline.run()                   run to the end, get a Report
    pipeline.stream()                iterate over results as they come
"""

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
    "PayloadError",
    "Pipeline",
    "PipelineError",
    "Reject",
    "Report",
    "Retry",
    "RunFailed",
    "Shard",
    "Skip",
    "TimeLimitExceeded",
    "WorkerLost",
]
