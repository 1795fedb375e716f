"""Time limits: the job that is over it fails, its neighbours don't; the run that is over it gives up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from jobq import Job, JobsFailed, Pipeline, PipelineError, RunFailed, TimeLimitExceeded
from tests.test_run import BACKENDS, Gate, Notes

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


@pytest.mark.parametrize("backend", (*PROCESSES, "thread", "inline"))
@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_async_job_over_its_time_is_cancelled_and_its_worker_lives(
    backend: str, concurrency: int, notes: Notes
) -> None:
    pipeline = Pipeline("async")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(10)

    @pipeline.consumer(timeout=LIMIT, concurrency=concurrency)
    async def work(item: int) -> int:
        try:
            if item == 4:
                await asyncio.Event().wait()
        finally:
            notes.add(item)
        return item

    report = pipeline.run(backend=backend, collect=True, check=False)

    assert sorted(report.results) == [number for number in range(10) if number != 4]
    assert [letter.error for letter in report.dead] == ["TimeLimitExceeded"]
    assert report.stages["work"].worker_restarts == 0
    assert "4" in notes.lines()


@pytest.mark.parametrize("backend", (*PROCESSES, "thread", "inline"))
def test_an_async_generator_over_its_time_is_closed_and_its_worker_lives(backend: str, notes: Notes) -> None:
    pipeline = Pipeline("async")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(6)

    @pipeline.consumer(timeout=LIMIT)
    async def work(item: int) -> AsyncIterator[int]:
        try:
            yield item
            if item == 4:
                await asyncio.Event().wait()
            yield -item
        finally:
            await asyncio.sleep(0)
            notes.add(item)

    report = pipeline.run(backend=backend, collect=True, check=False)

    assert sorted(report.results) == [-5, -3, -2, -1, 0, 0, 1, 2, 3, 5]
    assert [letter.error for letter in report.dead] == ["TimeLimitExceeded"]
    assert report.stages["work"].worker_restarts == 0
    assert "4" in notes.lines()


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


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "soon"])
def test_a_time_limit_that_is_no_time_is_refused(value: object) -> None:
    pipeline = Pipeline("wrong")

    with pytest.raises(PipelineError, match=r"work\(\).*option timeout="):
        pipeline.consumer(lambda item: item, name="work", timeout=value)
    for start in (pipeline.run, pipeline.stream, pipeline.open, lambda **given: Pipeline("wrong", **given)):
        with pytest.raises(PipelineError, match="run option timeout="):
            start(timeout=value)


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


# --- the whole run -------------------------------------------------------------------------------


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


def gated(gate: Gate, notes: Notes, **options: object) -> Pipeline:
    """Return a pipeline of twenty items whose job number 7 waits until the gate is open."""
    pipeline = Pipeline("gated")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(20)

    @pipeline.consumer(**options)
    def work(item: int) -> int:
        if item == 7:
            gate.wait()
        notes.add(item)
        return item

    return pipeline


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"concurrency": 3}], ids=str)
@pytest.mark.parametrize("backend", (*PROCESSES, "thread"))
def test_a_run_over_its_time_gives_up_and_the_rest_is_cancelled(
    backend: str, options: dict[str, int], gate: Gate, notes: Notes, tmp_path: Path
) -> None:
    file = tmp_path / "dead.jsonl"

    with pytest.raises(
        RunFailed, match=r"longer than its timeout of 0\.5 s; giving up, \d+ jobs? "
    ) as caught:
        gated(gate, notes, **options).run(backend=backend, timeout=0.5, dead_letters=file, check=False)
    done = set(map(int, notes.lines()))
    gate.open()

    assert caught.value.report is not None
    stage = caught.value.report.stages["work"]
    letters = [json.loads(line) for line in file.read_text().splitlines()]
    cancelled = {letter["item"] for letter in letters if letter["status"] == "cancelled"}
    assert (stage.received, stage.done + stage.cancelled) == (20, 20)
    assert len(letters) == len(cancelled) == stage.cancelled
    assert 7 in cancelled
    # A job that was done and whose answer had not come is cancelled too: at least once.
    assert done | cancelled == set(range(20))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_without_time_says_who_had_more_to_give(backend: str) -> None:
    pipeline = Pipeline("none")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from iter(int, 1)

    @pipeline.consumer
    def work(item: int) -> None: ...

    with pytest.raises(RunFailed, match=r"giving up, [\d,]+ jobs? unfinished, more to come from numbers$"):
        pipeline.run(backend=backend, timeout=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_within_its_time_is_fine(backend: str, gate: Gate, notes: Notes) -> None:
    gate.open()

    report = gated(gate, notes).run(backend=backend, timeout=200, collect=True)

    assert sorted(report.results) == list(range(20))


@pytest.mark.parametrize("backend", PROCESSES)
def test_the_time_of_a_run_includes_its_workers_end(backend: str, notes: Notes) -> None:
    pipeline = Pipeline("closing")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(20)

    @pipeline.resource
    def stuck() -> Iterator[int]:
        yield 1
        signal.pause()

    @pipeline.consumer
    def work(item: int, stuck: int) -> None:  # noqa: ARG001
        notes.add(item)

    with pytest.raises(RunFailed, match=r"giving up, 0 jobs unfinished$"):
        pipeline.run(backend=backend, timeout=0.5)

    assert len(notes.lines()) == 20


@pytest.mark.parametrize("backend", (*PROCESSES, "thread"))
def test_a_stream_over_its_time_gives_what_it_has_and_raises(backend: str, gate: Gate, notes: Notes) -> None:
    got = []

    with pytest.raises(RunFailed, match="longer than its timeout"):
        for result in gated(gate, notes).stream(backend=backend, timeout=0.5):
            got.append(result)  # noqa: PERF402  # what came before the error is wanted
    gate.open()

    assert set(got) <= set(range(20)) - {7}


@pytest.mark.parametrize("backend", (*PROCESSES, "thread"))
def test_a_session_over_its_time_settles_every_future(backend: str, gate: Gate, notes: Notes) -> None:
    run = gated(gate, notes).open(backend=backend, timeout=0.5)
    first, stuck = run.submit(1), run.submit(7)

    with pytest.raises(RunFailed, match="longer than its timeout"):
        stuck.result(timeout=60)
    with pytest.raises(RunFailed, match="longer than its timeout"):
        run.close()
    gate.open()

    assert first.result() == 1


ENDLESS = """
import signal
from collections.abc import Iterator
from jobq import Pipeline

pipeline = Pipeline("endless")

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(5)

@pipeline.consumer(queue_size=100)
def work(item: int) -> None:
    signal.pause()
"""


@pytest.mark.parametrize("how", ["--timeout", "JOBQ_TIMEOUT"])
def test_a_command_over_its_time_is_code_3_and_says_what_is_unfinished(how: str, tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    command = [sys.executable, "-m", "jobq.cli", "run", "endless.py", "--dead-letters", "dead.jsonl"]
    given = [how, "0.5"] if how.startswith("-") else []
    environment = os.environ | ({} if given else {how: "0.5"})

    ended = subprocess.run(
        [*command, *given], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip

    assert ended.returncode == 3, ended.stderr
    assert (
        "jobq: the run took longer than its timeout of 0.5 s; giving up, 5 jobs unfinished\n" in ended.stderr
    )
    letters = [json.loads(line) for line in (tmp_path / "dead.jsonl").read_text().splitlines()]
    assert sorted(letter["item"] for letter in letters) == list(range(5))
    assert {letter["status"] for letter in letters} == {"cancelled"}
