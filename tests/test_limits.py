"""A time limit: the job that is over it fails, its neighbours don't."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobq import Job, JobsFailed, Pipeline, PipelineError, TimeLimitExceeded

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

PROCESSES = ("joinable", "sentinel", "pipe")
LIMIT = 0.3
#: Seconds by which the first call may be late against the others, on a busy machine.
SLACK = 0.1
EXAMPLE = Path(__file__).parent.parent / "examples" / "rate_limited_api.py"


def stuck_at(number: int, **options: object) -> Pipeline:
    """Return a pipeline of twenty items whose job *number* never ends by itself."""
    pipeline = Pipeline("limits")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(20)

    @pipeline.consumer(timeout=LIMIT, **options)
    def work(item: int) -> int:
        if item == number:
            signal.pause()  # in C code, deaf to everything but a kill
        return item

    return pipeline


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"concurrency": 3}], ids=str)
@pytest.mark.parametrize("backend", PROCESSES)
def test_a_job_that_takes_too_long_is_a_dead_letter_and_the_others_are_done(
    backend: str, options: dict[str, int]
) -> None:
    pipeline = stuck_at(7, **options)

    with pytest.raises(JobsFailed) as caught:
        pipeline.run(backend=backend, collect=True)

    report = caught.value.report
    assert [type(error) for error in caught.value.exceptions] == [TimeLimitExceeded]
    assert sorted(report.results) == [number for number in range(20) if number != 7]
    assert [(letter.item, letter.error, letter.deliveries) for letter in report.dead] == [
        (7, "TimeLimitExceeded", 1)
    ]


@pytest.mark.parametrize("backend", PROCESSES)
def test_a_job_over_its_time_may_be_tried_again(backend: str, tmp_path: Path) -> None:
    pipeline = Pipeline("again")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(5)

    @pipeline.consumer(timeout=LIMIT, max_retries=1, min_backoff=0.0)
    def work(item: int, job: Job) -> int:
        with (tmp_path / "calls").open("a") as calls:
            calls.write(f"{item}\n")
        if item == 3 and job.attempt == 1:
            signal.pause()
        return item

    report = pipeline.run(backend=backend, collect=True)

    assert sorted(report.results) == [0, 1, 2, 3, 4]
    assert report.stages["work"].retried == 1
    assert (tmp_path / "calls").read_text().split().count("3") == 2


def test_a_thread_over_its_time_is_abandoned_and_the_others_are_done() -> None:
    pipeline = Pipeline("threads")
    gate = threading.Event()

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(10)

    @pipeline.consumer(timeout=LIMIT)
    def work(item: int) -> int:
        if item == 4:
            gate.wait()
        return item

    try:
        report = pipeline.run(backend="thread", collect=True, check=False)
    finally:
        gate.set()

    assert sorted(report.results) == [number for number in range(10) if number != 4]
    assert [letter.error for letter in report.dead] == ["TimeLimitExceeded"]


def test_inline_judges_a_job_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline("inline")
    now = [0]
    monkeypatch.setattr("jobq.work.time.monotonic_ns", lambda: now[0])

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(3)

    @pipeline.consumer(timeout=LIMIT)
    def work(item: int) -> int:
        now[0] += 10**9 if item == 1 else 0
        return item

    report = pipeline.run(backend="inline", collect=True, check=False)

    assert report.results == [0, 2]
    assert [letter.error for letter in report.dead] == ["TimeLimitExceeded"]


@pytest.mark.parametrize("backend", (*PROCESSES, "thread"))
def test_an_async_job_over_its_time_is_cancelled_and_its_worker_lives(backend: str) -> None:
    pipeline = Pipeline("async")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(10)

    @pipeline.consumer(timeout=LIMIT, concurrency=4)
    async def work(item: int) -> int:
        if item == 4:
            await asyncio.Event().wait()
        return item

    report = pipeline.run(backend=backend, collect=True, check=False)

    assert sorted(report.results) == [number for number in range(10) if number != 4]
    assert [letter.error for letter in report.dead] == ["TimeLimitExceeded"]
    assert report.stages["work"].worker_restarts == 0


@pytest.mark.parametrize("backend", PROCESSES)
def test_a_batch_over_its_time_fails_whole(backend: str) -> None:
    pipeline = Pipeline("batch")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(9)

    @pipeline.consumer(timeout=LIMIT, batch=3)
    def work(items: list[int]) -> int:
        if 4 in items:
            signal.pause()
        return len(items)

    report = pipeline.run(backend=backend, collect=True, check=False)

    dead = {letter.item for letter in report.dead}
    assert 4 in dead
    assert sum(report.results) == 9 - len(dead)
    assert {letter.error for letter in report.dead} == {"TimeLimitExceeded"}


def test_a_time_limit_that_is_no_time_is_refused() -> None:
    pipeline = Pipeline("wrong")

    with pytest.raises(PipelineError, match="timeout"):
        pipeline.consumer(lambda item: item, name="work", timeout=0)


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"concurrency": 4}, {"batch": 2}], ids=str)
@pytest.mark.parametrize("backend", (*PROCESSES, "thread", "inline"))
def test_calls_of_all_workers_together_are_no_more_often_than_the_rate(
    backend: str, options: dict[str, int]
) -> None:
    pipeline = Pipeline("rate")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(12)

    def one(item: int) -> float:  # noqa: ARG001
        return time.monotonic()

    def many(items: list[int]) -> float:  # noqa: ARG001
        return time.monotonic()

    pipeline.consumer(many if "batch" in options else one, name="call", rate=50, **options)

    report = pipeline.run(backend=backend, collect=True)

    calls = sorted(report.results)
    assert len(calls) == 12 // options.get("batch", 1)
    # A bound that holds however busy the machine is: calls come late, never early on the whole.
    assert calls[-1] - calls[0] >= (len(calls) - 1) / 50 - SLACK


@pytest.mark.parametrize("backend", (*PROCESSES, "thread", "inline"))
def test_the_example_of_a_limited_api_gets_all_its_answers(backend: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE), backend], capture_output=True, text=True, timeout=60, check=False
    )

    assert ended.returncode == 0, ended.stderr
    answers, pace = ended.stdout.splitlines()
    assert answers.startswith("30 answers")
    assert pace == "not faster than allowed"
