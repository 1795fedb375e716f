"""How a run ended, as its caller is to be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobq.report import Report


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    The report, and at most one reason why the run did not end by itself.

    ``signal``: stopped by that signal with work unfinished. ``heard``: the first stop signal, whatever became
    of the work, if the program has not heard of it yet. ``gave_up``: why it could not go on.
    ``unbalanced``: how the books differ. ``stdout_closed``: nobody reads the output any more.
    ``exceptions``: those of the first dead jobs. ``unloadable``: results that were made and can't be loaded.
    """

    report: Report
    signal: int | None = None
    heard: int | None = None
    gave_up: str | None = None
    unbalanced: str | None = None
    stdout_closed: bool = False
    exceptions: tuple[Exception, ...] = ()
    unloadable: tuple[Exception, ...] = ()
