"""
Every error that jobq raises, in one tree.

    JobqError
    ├── PipelineError         the definition is wrong; nothing was started
    ├── BackendUnavailable    the backend or start method can't be used here
    ├── PayloadError          an item fails validation, routing or pickling
    ├── WorkerLost            a job's worker died each time it had the job in hand
    ├── TimeLimitExceeded     a job took longer than its stage's ``timeout``
    ├── JoinTimeout           ``run.join(timeout)`` ran out
    ├── RunFailed             the run gave up, or was stopped, with work unfinished
    ├── JobsFailed            the run finished, with dead letters (also an ExceptionGroup)
    └── JobsLost              the books don't balance: a bug in jobq

    Control                   raised *by* a job, to steer what becomes of it
    ├── Retry                 try again later
    ├── Reject                a dead letter now
    └── Skip                  filtered
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobq.report import Report


class JobqError(Exception):
    """The root of jobq's errors."""


class PipelineError(JobqError):
    """
    The definition of a pipeline is wrong; no process has been started.

    ``problems`` holds one text per problem; the message lists all of them.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems: tuple[str, ...] = problems


class BackendUnavailable(JobqError):
    """The backend or the start method can't be used here; the message says what to do."""


class PayloadError(JobqError):
    """An item fails validation, routing or pickling; the message names the stage and the field."""


class WorkerLost(JobqError):
    """A job is given up because its worker died each time that it had the job in hand."""


class TimeLimitExceeded(JobqError):
    """A job took longer than its stage's ``timeout``."""


class JoinTimeout(JobqError):
    """``run.join(timeout)`` returned before everything submitted was settled."""


class RunFailed(JobqError):
    """
    The run gave up, with work unfinished (``report`` says how much).

    Workers die again and again, or the run's ``timeout`` is over.
    """

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class JobsFailed(ExceptionGroup[Exception], JobqError):
    """
    The run finished, and some of its jobs are dead letters.

    ``exceptions`` holds at most the first 100 of them, ``report`` the whole run.
    """

    report: Report

    def __new__(cls, message: str, exceptions: Sequence[Exception], report: Report) -> JobsFailed:
        self = super().__new__(cls, message, exceptions)
        self.report = report
        return self

    def __init__(self, message: str, exceptions: Sequence[Exception], report: Report) -> None:  # noqa: ARG002
        # ExceptionGroup.__new__ has taken the arguments; object state was set there too.
        super().__init__(message, exceptions)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled with the report, as a process that ran a pipeline hands it on."""
        return type(self), (self.message, self.exceptions, self.report), self.__dict__

    def derive(self, excs: Sequence[Exception]) -> JobsFailed:  # type: ignore[override]  # always Exceptions here
        """Return a group of *excs* with the same message and report (used by ``except*`` and ``split``)."""
        return JobsFailed(self.message, excs, self.report)


class JobsLost(JobqError):
    """
    The counts of workers and driver differ: a bug in jobq, please report it.

    ``report`` is what the driver believes.
    """

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class Control(Exception):
    """What a job raises to say what becomes of it."""


class Retry(Control):
    """
    Try this job again, after *delay* seconds if given (else the stage's back-off).

    Counts as a retry: past ``max_retries`` the job is a dead letter.
    """

    def __init__(self, delay: float | None = None) -> None:
        super().__init__(delay)
        self.delay = delay


class Reject(Control):
    """Make this job a dead letter now, without a retry."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class Skip(Control):
    """Filter this job: it is neither done nor dead, and gives nothing on."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class Interrupted(BaseException):
    """A stop that gets through the job in hand, where jobs run in the thread that waits for them."""


class EndOfChannel(Exception):
    """The other side ended cleanly: not an error."""


class BrokenChannel(Exception):
    """The other side was lost; ``str()`` says how."""


class SpoiltChannel(BrokenChannel):
    """A job of the other side wrote into the channel, or closed it: any that is not answered can have."""
