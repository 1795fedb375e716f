"""
Fault points: instants at which a test lets a process of a run fail, to see what becomes of the jobs.

    JOBQ_FAULT="point[:n][=action][@file]"        JOBQ_FAULT="worker.half_frame:3=kill@/tmp/passings"

Read once, when jobq is imported; without it every point is one test of an attribute, and the points around
a job are not even there. ``n`` (1 if not given) is the passing at which it happens. Each process counts its
own passings: a replacement would fail like the worker before it. With *file* the passings of all processes
are counted together, so the fault happens once; the file then names the process of each passing.

Actions: ``kill`` (if none is given), ``exit``, ``raise`` (`Fault`), ``stop`` (until SIGCONT), ``sleep``, or
an error that the system could give (``EMFILE``). Points of workers are for process backends: on others
the process is the program itself.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import time
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

#: Where a process can be made to fail. ``frame`` is what a worker says, ``recv`` what it is told.
POINTS = frozenset(
    f"{role}.{name}"
    for role, names in {
        "worker": "started before_recv half_recv after_recv before_work after_work"
        " before_frame half_frame after_frame before_exit",
        "producer": "before_frame half_frame after_frame",
        "driver": "before_put after_results before_task_done respawn",
    }.items()
    for name in names.split()
)
ACTIONS = frozenset({"kill", "exit", "raise", "stop", "sleep"})
SLEEP_SECONDS = 0.1
#: Exit code of the action ``exit``.
EXIT_CODE = 99
#: One passing in a file: who passed.
PASSING = struct.Struct("<q")


class Fault(Exception):
    """What the action ``raise`` raises."""


#: Whether any fault is set: points look at nothing else.
armed = False
#: What this process is: "worker", "producer" or "driver".
role = "driver"

_point = ""
_at = 1
_action = "kill"
_file = ""
_passed = 0


def arm(text: str | None) -> None:
    """Set the fault that *text* describes, in this process and those it forks; None: none."""
    global armed, _point, _at, _action, _file, _passed
    rest, _, _file = (text or "").partition("@")
    rest, _, action = rest.partition("=")
    _point, _, at = rest.partition(":")
    _at, _action, _passed, armed = int(at or 1), action or "kill", 0, bool(text)
    if armed and (_point not in POINTS or not (_action in ACTIONS or hasattr(errno, _action))):
        raise ValueError(
            f"JOBQ_FAULT={text!r} is not point[:n][=action][@file] with one of the points"
            f" {', '.join(sorted(POINTS))} and one of the actions {', '.join(sorted(ACTIONS))} or an errno"
        )


def become(what: str) -> None:
    """Say what this process is from now on."""
    global role  # noqa: PLW0603  # a process is one thing
    role = what


def reach(name: str) -> None:
    """Let the fault happen if it is set for this point of such a process, and its turn has come."""
    global _passed  # noqa: PLW0603  # each process counts
    if f"{role}.{name}" != _point:
        return
    _passed = _count_in_file() if _file else _passed + 1
    if _passed == _at:
        _fail()


def around(function: Function) -> Function:
    """Return *function* with the points before and after a job, if the fault is set for one of them."""
    if role != "worker" or _point not in ("worker.before_work", "worker.after_work"):
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        reach("before_work")
        given = function(*args, **kwargs)
        reach("after_work")
        return given

    return call  # type: ignore[return-value]  # called like it


def _count_in_file() -> int:
    # Appending is atomic, and the position after it is ours: no two processes get the same number.
    fd = os.open(_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, PASSING.pack(os.getpid()))
        return os.lseek(fd, 0, os.SEEK_CUR) // PASSING.size
    finally:
        os.close(fd)


def _fail() -> None:
    what = f"JOBQ_FAULT: {_point}, passing {_at}"
    if _action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif _action == "exit":
        os._exit(EXIT_CODE)
    elif _action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif _action == "sleep":
        time.sleep(SLEEP_SECONDS)
    elif _action == "raise":
        raise Fault(what)
    else:
        number = getattr(errno, _action)
        raise OSError(number, f"{os.strerror(number)} ({what})")


arm(os.environ.get("JOBQ_FAULT"))
