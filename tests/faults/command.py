"""Runs a pipeline as a user does: a file, a command, an exit code, and what is on standard error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.test_examples import session_members

PREAMBLE = """\
import os, signal, sys, threading, time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from jobq import Job, Pipeline

pipeline = Pipeline("faulty")

def note(line: object, name: str = "notes") -> None:
    fd = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{line}\\n".encode())
    os.close(fd)

def noted(name: str = "notes") -> list[str]:
    return Path(name).read_text().split("\\n")[:-1] if Path(name).exists() else []

def until(claim) -> None:
    deadline = time.monotonic() + 20
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.001)

def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)
"""


@dataclass(frozen=True)
class Ended:
    """What a run left: its results, its dead letters, what it said, and what jobs noted."""

    code: int
    results: list[Any]
    dead: list[dict[str, Any]]
    said: str
    notes: list[str]


def jobq(folder: Path, text: str, *options: str, **environment: str) -> Ended:
    """Run the pipeline *text* in *folder*; nothing of it is left behind."""
    (folder / "faulty.py").write_text(PREAMBLE + text)
    letters, results = folder / "dead.jsonl", folder / "results.jsonl"
    written = ("-o", str(results), "--dead-letters", str(letters), "--log-format", "console")
    process = subprocess.Popen(
        [sys.executable, "-m", "jobq.cli", "run", "faulty.py", *written, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        try:
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert all(" Z " in one for one in session_members(process.pid)), "processes outlived the run"
    return Ended(process.returncode, _lines(results), _lines(letters), said.decode(), _text(folder / "notes"))


def _text(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []
