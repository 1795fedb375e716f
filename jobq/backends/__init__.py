"""Backends by name: the built-in ones, and those that other packages give under ``jobq.backends``."""

from __future__ import annotations

import errno
import multiprocessing
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from jobq.backend import Backend
from jobq.errors import BackendUnavailable

GROUP = "jobq.backends"
BUILT_IN = {
    "joinable": "JoinableBackend",
    "sentinel": "SentinelBackend",
    "pipe": "PipeBackend",
    "thread": "ThreadBackend",
    "inline": "InlineBackend",
}


def load(name: str) -> type[Backend]:
    """
    Return the backend class called *name*; nothing else is imported.

    Raises `BackendUnavailable` if there is none, or if it can't be imported.
    """
    if name in BUILT_IN:
        found: object = getattr(import_module(f"jobq.backends.{name}"), BUILT_IN[name])
    else:
        found = _load_foreign(name)
    return cast("type[Backend]", found)  # a class from outside is held to the protocol by check_backend


def load_default() -> type[Backend]:
    """Return `joinable`, or `pipe` where the system has none of the semaphores that a queue needs."""
    return load("joinable" if _semaphores_exist() else "pipe")


def _semaphores_exist() -> bool:
    try:
        multiprocessing.get_context("fork").Lock()
    except ImportError:  # Python was built without them
        return False
    except OSError as error:  # some lack is another matter: it is told when a worker is started
        return error.errno not in (errno.ENOSYS, errno.ENOENT, errno.EACCES, errno.EPERM)
    return True


def names() -> list[str]:
    """Return the names that `load` knows."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def _load_foreign(name: str) -> object:
    points = tuple(entry_points(group=GROUP, name=name))
    if not points:
        raise BackendUnavailable(f"there is no backend {name!r}; known are {', '.join(names())}.")
    point: EntryPoint = points[0]
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(
            f"backend {name!r} ({point.value}) can't be imported: {error}. Is everything it needs installed?"
        ) from error
