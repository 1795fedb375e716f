"""What is shown of a run: each module is a fold over its events, and knows events and reports only."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobq.events import Observer
    from jobq.observe.log import LogSettings
    from jobq.options import RunOptions


def log_settings(options: RunOptions) -> LogSettings | None:
    """Return how every process of the run logs; None leaves logging as it is."""
    if options.log_level is None and options.log_format is None:
        return None
    from jobq.observe.log import read_log_settings

    return read_log_settings(options.log_level, options.log_format, live=options.progress)


def somebody_listens() -> bool:
    """Whether the program has set up its logging so that lines of the logger "jobq" arrive somewhere."""
    logger: logging.Logger | None = logging.getLogger("jobq")
    while logger is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


@contextmanager
def observing(options: RunOptions) -> Iterator[list[Observer]]:
    """
    Give the observers that *options* ask for; inside the ``with`` this process logs as they say.

    The log's observer is among them if they ask for a log, or if the program's own logging listens.
    """
    settings = options.log_level or options.log_format
    if not (settings or options.progress or somebody_listens()):
        yield []  # and nothing is imported
        return
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
