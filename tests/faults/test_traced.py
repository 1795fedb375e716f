"""A worker is killed while a debugger has stopped it: its parent hears nothing until the debugger lets go."""

from __future__ import annotations

import ctypes
import os
import signal

import pytest

from tests.faults.programs import Program, assert_all_done, assert_row, with_fault
from tests.faults.rows import fault

pytestmark = [pytest.mark.slow]

PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207


def trace(pid: int) -> None:
    """Stop a process as a debugger does."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        assert ptrace(request, pid, None, None) == 0, os.strerror(ctypes.get_errno())
    os.waitpid(pid, 0)


@fault(
    "A30",
    "stopped by a debugger, then killed: `waitpid` tells its parent nothing until the debugger lets go",
    items="again",
    sees="`worker 1 of stage work (pid 4711) ended, how is not known while on item 7; "
    "the item goes to another worker, attempt 2 of 3`",
    exit=0,
)
def test_the_death_of_a_traced_worker_is_seen(program: Program) -> None:
    run = program.start(with_fault('if first("fault"):\n    note("pid", os.getpid())\n    time.sleep(1000)'))
    program.until(lambda: bool(program.noted("pid")))
    (pid,) = map(int, program.noted("pid"))
    trace(pid)

    os.kill(pid, signal.SIGKILL)

    try:
        program.until(lambda: len(program.noted("kept")) == 20)
    finally:
        os.waitpid(pid, 0)
    ended = program.end(run)
    assert_row("A30", ended)
    assert_all_done(ended)
