"""What workers do in tests: at module level, so that spawned workers find it."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from jobq.backend import Plan, Port, Preload
from jobq.testing import RECIPES, Recipe, echo, gate
from jobq.wire import MAGIC, PREFIX, Order

_kept: list[IO[str]] = []


def close_everything_and_open(port: Port, order: Order, items: list[Any]) -> None:
    """Close every descriptor, and open the user's files in their places."""
    os.closerange(3, 1000)
    for _ in range(60):
        _keep_open(items[0])
    echo(port, order, items)


def replace_the_inbox(port: Port, order: Order, items: list[Any]) -> None:
    """Open the user's file in the place of the inbox."""
    os.close(port._incoming.fd)  # type: ignore[attr-defined]  # the port of processes
    _keep_open(items[0])
    echo(port, order, items)


def fork_and_come_back_twice(port: Port, order: Order, items: list[Any]) -> None:
    """Return from the job in two processes."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    echo(port, order, items)


def leave_a_grandchild(port: Port, order: Order, _: list[Any]) -> None:
    """Answer with the number of a process that holds all of our descriptors, and then die."""
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    echo(port, order, [pid])
    os.kill(os.getpid(), signal.SIGKILL)


def write_without_closing(port: Port, order: Order, items: list[Any]) -> None:
    """Leave a line in a file's buffer, and another in an exit hook."""
    _keep_open(items[0]).write("written by the job\n")
    atexit.register(partial(_append, items[0], "written at exit\n"))
    echo(port, order, items)


def _keep_open(path: str) -> IO[str]:
    file = Path(path).open("a")  # noqa: SIM115  # kept open on purpose
    _kept.append(file)
    return file


def _append(path: str, line: str) -> None:
    with Path(path).open("a") as file:
        file.write(line)


def who_am_i(port: Port, order: Order, _: list[Any]) -> None:
    """Answer with our name, whether we are a daemon, and whether we may have children."""
    me = multiprocessing.current_process()
    child = multiprocessing.get_context("spawn").Process(target=int)
    try:
        child.start()
        child.join()
        may = True
    except AssertionError:
        may = False
    echo(port, order, [me.name, me.daemon, may])


def dispositions(port: Port, order: Order, _: list[Any]) -> None:
    """Send ourselves what a terminal sends, then answer with how we take SIGTERM."""
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(os.getpid(), number)
    echo(port, order, [signal.getsignal(signal.SIGTERM) is signal.SIG_DFL])


def draw(port: Port, order: Order, _: list[Any]) -> None:
    """Answer with a random number."""
    echo(port, order, [random.random()])


def write_garbage(port: Port, *_: object) -> None:
    """Write into the channel's descriptor what is no frame."""
    os.write(port._outbox, b"print goes here" * 10)  # type: ignore[attr-defined]  # the port of processes
    time.sleep(1000)


def die_in_a_frame(port: Port, *_: object) -> None:
    """Write a frame's beginning, and die."""
    half = PREFIX.pack(MAGIC, 10, 1_000_000) + b"x" * 1000
    os.write(port._outbox, half)  # type: ignore[attr-defined]  # the port of processes
    os.kill(os.getpid(), signal.SIGKILL)


def where_from(port: Port, order: Order, items: list[Any]) -> None:
    """Answer with what the module given by its name has as ``COLOUR``."""
    echo(port, order, [sys.modules[items[0]].COLOUR])


def interrupt(*_: object) -> None:
    """Do as a user does who presses Ctrl-C while inline work runs."""
    raise KeyboardInterrupt


ACTS = (
    close_everything_and_open,
    replace_the_inbox,
    fork_and_come_back_twice,
    leave_a_grandchild,
    write_without_closing,
    who_am_i,
    dispositions,
    draw,
    write_garbage,
    die_in_a_frame,
    where_from,
    interrupt,
    gate,
)


def plan(
    start_method: str = "auto",
    *,
    preload: Preload | None = None,
    daemon: dict[str, bool] | None = None,
    first: Sequence[str] = (),
) -> Plan:
    """Return a plan with all of these, and those of `jobq.testing`; *first* are the recipes of the first."""
    recipes = {**RECIPES, **{act.__name__: Recipe(act) for act in ACTS}}
    names = [(f"{recipe}-{number}", recipe) for number, recipe in enumerate(first)]  # as a bench names them
    return Plan(recipes, start_method, preload, daemon or {}, first=names)
