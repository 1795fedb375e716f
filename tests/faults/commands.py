"""A pipeline file, and what ``jobq run`` made of it: exit code, words, and the file that its jobs wrote."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.test_examples import session_members

PROCESSES = ("joinable", "sentinel", "pipe")
START_METHODS = ("fork", "forkserver", "spawn")
#: Every process backend, and every start method.
WAYS = (
    ("joinable", "fork"),
    ("sentinel", "fork"),
    ("pipe", "fork"),
    ("joinable", "forkserver"),
    ("joinable", "spawn"),
)
#: Seconds that a process may outlive a run: one, and some for a busy machine.
SURVIVAL = 2.0
#: As the script `jobq` does, without the current folder on the path.
JOBQ = (sys.executable, "-P", "-m", "jobq.cli")

#: What every pipeline file begins with. `note` appends a line to a file, which is the evidence from outside.
HEAD = """\
import os, signal, sys, time
from collections.abc import Iterator
from pathlib import Path
from jobq import Job, Pipeline

FOLDER = Path(__file__).parent
pipeline = Pipeline("p")

def note(line):
    fd = os.open(FOLDER / "notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{line}\\n".encode())
    os.close(fd)

@pipeline.producer
def numbers(count: int = 6) -> Iterator[int]:
    yield from range(count)

"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def notes(self) -> list[str]:
        """The lines that jobs noted."""
        file = self.folder / "notes"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def results(self) -> list[str]:
        """The results that were written, sorted."""
        file = self.folder / "results"
        return sorted(file.read_text().splitlines()) if file.exists() else []


def write(folder: Path, text: str, *, name: str = "pipeline_file.py", head: str = HEAD) -> Path:
    """Write a pipeline file and return its path."""
    path = folder / name
    path.write_text(head + text)
    return path


def jobq_run(path: Path, *arguments: str, **how: Any) -> Ended:
    """Run a pipeline file in a session of its own, and prove that nothing of the session is left."""
    command = (*JOBQ, "run", path.name, "-o", "results", "--log-format", "console", *arguments)
    return ended(command, path.parent, **how)


def ended(
    command: tuple[str, ...],
    folder: Path,
    *,
    set_up: Callable[[], None] | None = None,
    timeout: float = 50,
    **environment: str | None,
) -> Ended:
    """
    Run a command to its end.

    *set_up* is called in its process first; a variable of the *environment* that is None is taken out.
    """
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=variables,  # type: ignore[arg-type]  # None was taken out
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=set_up,  # noqa: PLW1509  # the tests run in a process without other threads
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            process.kill()
        left = survivors(process.pid)
    assert left == [], "processes outlived the run"
    return Ended(process.returncode, stdout, stderr, folder)


def survivors(session: int) -> list[str]:
    """Return the processes of *session* that run on, for longer than a process takes to end."""
    deadline = time.monotonic() + SURVIVAL
    while left := [stat for stat in session_members(session) if stat.rpartition(")")[2].split()[0] != "Z"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return left
