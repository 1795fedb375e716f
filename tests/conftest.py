"""Fixtures of all tests: nothing may hang, and nothing may be left behind."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import NoReturn

import pytest

from jobq.testing import left_since, snapshot

#: What these do must not decide a test. The first, common in containers, has each word of a printed line
#: written by itself; then the lines of two workers are mixed.
SWITCHES = (
    "PYTHONUNBUFFERED",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONDEVMODE",
    "PYTHONWARNINGS",
    "PYTHONOPTIMIZE",
)

#: Seconds that one test may take.
LIMIT = 60.0


#: Each backend is tried here, and each start method, but not both at once; elsewhere only with ``--matrix``.
EVERYWHERE = ("tests/test_backends.py", "tests/test_load.py", "tests/test_run.py")
OTHERS = {"sentinel", "pipe", "forkserver", "spawn"}


def pytest_configure() -> None:
    """Have every program that a test starts begin as from a terminal, however the tests were started."""
    for name in SWITCHES:
        os.environ.pop(name, None)
    # A script's ``pytest &`` and ``nohup pytest`` ignore these, and what is ignored is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--matrix``."""
    parser.addoption("--matrix", action="store_true", help="try everything on every backend and start method")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the matrix out unless it was asked for: it takes longer than all the rest."""
    if config.getoption("--matrix"):
        return
    left_out = {item for item in items if _is_of_the_matrix(item)}
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_of_the_matrix(item: pytest.Item) -> bool:
    if item.get_closest_marker("matrix") is not None:
        return True
    allowed = 1 if item.nodeid.startswith(EVERYWHERE) else 0
    return len(OTHERS & _words(item)) > allowed


def _words(item: pytest.Item) -> set[str]:
    """Return the words of a test's parameters."""
    return set(re.findall(r"[a-z]+", item.name.partition("[")[2]))


@pytest.fixture(autouse=True)
def time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """
    A test that hangs fails, with the traceback of every thread.

    By a signal, since pytest's own limit is a thread, and with threads jobq doesn't fork unless told to.
    """
    faulthandler.cancel_dump_traceback_later()
    before = signal.signal(signal.SIGALRM, _too_long)
    slow = request.node.get_closest_marker("slow") is not None
    signal.setitimer(signal.ITIMER_REAL, LIMIT * 4 if slow else LIMIT)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _too_long(*_: object) -> NoReturn:
    faulthandler.dump_traceback(2)
    raise TimeoutError("the test took too long: something hangs")


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """After the test no process, thread, descriptor or shared memory is there that was not before it."""
    resource_tracker.ensure_running()  # multiprocessing's own, one for the whole session
    before = snapshot()
    yield
    left = left_since(before)
    # What a test beside this one has at the moment, under `pytest -n`: it looks itself that nothing stays.
    others = [name for name in left.get("shared memory", ()) if name.startswith("tests-")]
    if others == left.get("shared memory"):
        del left["shared memory"]
    assert not left, f"left behind: {left}"
