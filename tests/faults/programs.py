"""Pipeline files, run as users do: by ``jobq run``, in a session of their own, judged from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.rows import ROWS

PROCESSES = ("joinable", "sentinel", "pipe")
START_METHODS = ("fork", "forkserver", "spawn")
#: Options that bring every process backend and every start method once.
EACH_START = (("-b", "sentinel"), ("-b", "pipe"), *(("--start-method", method) for method in START_METHODS))
#: Seconds that a process may outlive its run: one, and some for a busy machine.
SURVIVAL = 2.0
#: Seconds after which a run hangs.
PATIENCE = 50.0
each_backend = pytest.mark.parametrize("backend", PROCESSES)
each_start = pytest.mark.parametrize("options", EACH_START, ids=" ".join)
each_start_method = pytest.mark.parametrize("method", START_METHODS)

#: What every file begins with: evidence that outlives the process that gave it, and ways to die.
HEAD = '''
import os, signal, sys, time
from collections.abc import Iterator
from pathlib import Path
from jobq import Job, Lock, Pipeline

HERE = Path(__file__).parent
pipeline = Pipeline("faulty")

def note(*words):
    """Leave a line of evidence, in one write."""
    fd = os.open(HERE / "notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (" ".join(map(str, words)) + "\\n").encode())
    os.close(fd)

def noted(word):
    """Return what was noted after *word*, one line each."""
    lines = (HERE / "notes").read_text().splitlines() if (HERE / "notes").exists() else []
    return [line.removeprefix(word + " ") for line in lines if line.startswith(word + " ")]

def first(name):
    """Whether nobody asked for *name* before, in any process."""
    try:
        (HERE / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)

def until(claim):
    deadline = time.monotonic() + 20
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.001)
'''

#: Twenty numbers through two stages. The job of 7 meets FAULT.
NUMBERS = """
@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(20)
"""
WORK = """
@pipeline.consumer(workers=2)
def work(i: int, job: Job) -> object:
    note("began", i)
    if i == 7:
        FAULT
    note("did", i)
    return i
"""
KEEP = """
@pipeline.consumer
def keep(i: object) -> None:
    note("kept", i)
"""


def with_fault(fault: str) -> str:
    """Return the program of twenty numbers whose job of 7 does *fault*."""
    return NUMBERS + WORK.replace("FAULT", textwrap.indent(textwrap.dedent(fault), " " * 8).strip()) + KEEP


@dataclass(frozen=True)
class Ended:
    """What is left of a run."""

    code: int
    out: str
    err: str
    folder: Path
    left: tuple[int, ...]

    def noted(self, word: str) -> list[str]:
        """Return what was noted after *word*."""
        return noted(self.folder, word)


def noted(folder: Path, word: str) -> list[str]:
    """Return what jobs noted after *word*, one line each."""
    path = folder / "notes"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} ")]


class Program:
    """A folder with one pipeline file, and the processes that were started for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def run(self, source: str, *options: str) -> Ended:
        """Return how ``jobq run`` ended on a file of HEAD and *source*."""
        return self.end(self.start(source, *options))

    def start(self, source: str, *options: str) -> subprocess.Popen[bytes]:
        """Start ``jobq run`` on a file of HEAD and *source*."""
        self.write(source)
        arguments = ("run", "pipeline.py", "--log-format", "console", *options)
        return self.launch("-m", "jobq.cli", *arguments)

    def write(self, source: str) -> None:
        """Make the file: HEAD and *source*."""
        (self.folder / "pipeline.py").write_text(HEAD + textwrap.dedent(source))

    def note(self, line: str) -> None:
        """Leave a line for jobs that wait for it."""
        with (self.folder / "notes").open("a") as file:
            file.write(f"{line}\n")

    def said(self, message: str) -> bool:
        """Return whether *message* is on standard error by now."""
        return says(message, self._read("err"))

    def launch(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start Python."""
        return self.execute(sys.executable, *arguments)

    def execute(self, *command: str) -> subprocess.Popen[bytes]:
        """Start *command*. Its output goes to files: a process that is left behind would hold a pipe open."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JOBQ_")}
        with (self.folder / "out").open("ab") as out, (self.folder / "err").open("ab") as err:
            process = subprocess.Popen(
                command, cwd=self.folder, start_new_session=True, env=environment,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            )  # fmt: skip
        self._started.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> Ended:
        """Return how *process* ended, and which of its session are still there a second later."""
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run hangs; it said: {self._read('err')}") from None
        code = code if code >= 0 else 128 - code  # as a shell has it
        return Ended(code, self._read("out"), self._read("err"), self.folder, self.left())

    def left(self) -> tuple[int, ...]:
        """Return the processes that were started for the program and are still there a second later."""
        sessions = {process.pid for process in self._started}
        patiently(lambda: not members(sessions), SURVIVAL)
        return tuple(members(sessions))

    def until(self, claim: Callable[[], bool]) -> None:
        """Return when *claim* is true; the time is a safety net only."""
        assert patiently(claim, PATIENCE), f"it never came true; the run said: {self._read('err')}"

    def noted(self, word: str) -> list[str]:
        """Return what jobs noted after *word* until now."""
        return noted(self.folder, word)

    def close(self) -> None:
        """Kill whatever is left of what was started."""
        for pid in members({process.pid for process in self._started}):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.wait()

    def _read(self, name: str) -> str:
        return (self.folder / name).read_text(errors="replace")


def patiently(claim: Callable[[], bool], seconds: float) -> bool:
    """Return whether *claim* comes true in so many *seconds*."""
    deadline = time.monotonic() + seconds
    while not (true := claim()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return true


def members(sessions: set[int]) -> list[int]:
    """Return the processes of these sessions that run, by the system's own list."""
    found = []
    for stat in (process / "stat" for process in Path("/proc").glob("[0-9]*")):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[3]) in sessions and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


def says(message: str, text: str) -> bool:
    """Return whether *text* has *message*, in which all numbers are alike and … is anything within a line."""
    pattern = re.sub(r"\d+(\\\.\d+)?", lambda _: r"\d+(?:\.\d+)?", re.escape(message).replace("…", ".*"))
    return re.search(pattern, text) is not None


def assert_row(name: str, ended: Ended) -> None:
    """The run ended with the row's exit code, said what the row has in backticks, and left nothing behind."""
    row = ROWS[name]
    assert ended.code == row.exit, ended.err
    for message in re.findall(r"`(.+?)`", row.sees):
        assert says(message, ended.err), f"not said: {message}\n{ended.err}"
    assert not ended.left, "processes outlived the run"
    assert "a bug in jobq" not in ended.err


def assert_all_done(ended: Ended, but: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    """Every number but *but* was worked on to the end, and entered the second stage once."""
    expected = {str(i) for i in range(20) if i not in but}
    assert set(ended.noted("did")) == expected, ended.err
    assert sorted(ended.noted("kept")) == sorted(expected), ended.err
