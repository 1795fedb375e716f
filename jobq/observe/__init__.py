"""What is shown of a run: each module is a fold over its events, and knows events and reports only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobq.events import Observer
    from jobq.observe.log import LogSettings
    from jobq.options import RunOptions


def log_settings(options: RunOptions) -> LogSettings | None:
    """Return how every process of the run logs; None leaves logging as it is."""
    from jobq.observe.log import read_log_settings

    return read_log_settings(options.log_level, options.log_format, live=options.progress)


@contextmanager
def observing(options: RunOptions) -> Iterator[list[Observer]]:
    """
    Give the observers that *options* ask for; inside the ``with`` this process logs as they say.

    The log's observer is always among them: unless asked, nobody listens to it but the program's own logging.
    """
    from jobq.observe.events_log import LogObserver
    from jobq.observe.log import configure
    from jobq.observe.progress import LiveProgress

    restore = configure(log_settings(options))
    progress = LiveProgress() if options.progress else None
    try:
        yield [LogObserver(), *([progress] if progress else [])]
    finally:
        if progress:
            progress.close()
        restore()
