"""Standard input: a producer that is alone has it; nobody else holds it, or reads nothing unawares."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobq import Pipeline
from tests.test_run import PROCESSES, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

LINES = [f"line {number}\n" for number in range(1000)]

READER = """
import subprocess, sys
from collections.abc import Iterator
from jobq import Pipeline

pipeline = Pipeline("reader")

@pipeline.producer(name="first")
def lines() -> Iterator[str]:
    for line in sys.stdin:
        yield line

@pipeline.consumer(workers=2)
def work(line: str) -> str:
    taken = subprocess.run(["cat"], capture_output=True, text=True).stdout if line == "line 3\\n" else ""
    return line + taken + sys.stdin.read()
"""
TWO = (
    READER
    + """
pipeline.producer(lines, name="second")
"""
)


def jobq(
    folder: Path, program: str, *options: str, given: str | None = None, stdin: Any = None
) -> subprocess.CompletedProcess[str]:
    (folder / "reader.py").write_text(program)
    command = [sys.executable, "-m", "jobq.cli", "run", "reader.py", "-o", "-", *options]
    return subprocess.run(
        command,
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
        input=given,
        stdin=stdin,
    )


def results(ended: subprocess.CompletedProcess[str]) -> list[str]:
    return sorted(map(json.loads, ended.stdout.splitlines()))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("backend", PROCESSES)
def test_a_producer_that_is_alone_reads_what_the_program_is_given(
    backend: str, method: str, tmp_path: Path
) -> None:
    ended = jobq(tmp_path, READER, "-b", backend, "--start-method", method, given="".join(LINES))

    assert ended.returncode == 0, ended.stderr
    assert results(ended) == sorted(LINES)


def test_a_file_is_read_as_a_pipe_is(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("".join(LINES))

    with (tmp_path / "lines").open() as lines:
        ended = jobq(tmp_path, READER, stdin=lines)

    assert results(ended) == sorted(LINES)


def test_a_terminal_is_read_until_its_end(tmp_path: Path) -> None:
    near, far = pty.openpty()
    os.write(near, b"one\ntwo\n\x04")
    try:
        ended = jobq(tmp_path, READER, stdin=far)
    finally:
        os.close(near)
        os.close(far)

    assert results(ended) == ["one\n", "two\n"]


def test_jobs_take_nothing_from_input_that_is_read_as_json_lines(tmp_path: Path) -> None:
    ended = jobq(tmp_path, READER, "--input", "-", given="".join(json.dumps(line) + "\n" for line in LINES))

    assert results(ended) == sorted(LINES)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_producers_that_read_it_fail_instead_of_sharing_it(method: str, tmp_path: Path) -> None:
    ended = jobq(
        tmp_path, TWO, "--start-method", method, "--dead-letters", "dead.jsonl", given="".join(LINES)
    )

    assert ended.returncode == 1
    letters = [json.loads(line) for line in (tmp_path / "dead.jsonl").read_text().splitlines()]
    assert sorted((letter["stage"], letter["error"]) for letter in letters) == [
        ("first", "OSError"),
        ("second", "OSError"),
    ]
    assert (
        "one worker only could read standard input, and this run's producers have 2" in letters[0]["message"]
    )


def test_a_program_without_standard_input_has_none(tmp_path: Path) -> None:
    (tmp_path / "reader.py").write_text(READER)
    command = [sys.executable, "-m", "jobq.cli", "run", "reader.py"]

    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command], cwd=tmp_path, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip

    assert ended.returncode == 1
    assert "producer first stopped: TypeError: 'NoneType' object is not iterable" in ended.stderr


@pytest.mark.parametrize("backend", PROCESSES)
def test_what_a_program_put_in_its_place_can_not_be_read_elsewhere(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "other").write_text("".join(LINES))
    pipeline = Pipeline("replaced")

    @pipeline.producer
    def lines() -> Iterator[str]:
        yield from sys.stdin

    @pipeline.consumer
    def work(line: str) -> None: ...

    with (tmp_path / "other").open() as other:
        monkeypatch.setattr("sys.stdin", other)
        report = run(pipeline, backend)

    assert [(letter.stage, letter.error) for letter in report.dead] == [("lines", "OSError")]
    assert "something else in place of its sys.stdin" in report.dead[0].message


@pytest.mark.parametrize("backend", ["thread", "inline"])
def test_in_the_programs_own_process_it_is_as_it_is(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "other").write_text("".join(LINES))
    pipeline = Pipeline("replaced")

    @pipeline.producer
    def lines() -> Iterator[str]:
        yield from sys.stdin

    with (tmp_path / "other").open() as other:
        monkeypatch.setattr("sys.stdin", other)
        report = run(pipeline, backend)

    assert report.results == LINES
