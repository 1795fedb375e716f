"""Workers that are replaced between jobs: after so many, above so much memory, after a MemoryError."""

from __future__ import annotations

import os
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobq import Job, Pipeline, PipelineError, RunFailed
from jobq.retirement import LOOK_NS, Retirement, resident
from tests.test_run import BACKENDS, PROCESSES, Notes, ints, run

pytestmark = pytest.mark.usefixtures("no_leaks")

MIB = 1024 * 1024
#: What a job itself may use between our look and its own.
SLACK = 2 * MIB


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


def by_worker(notes: Notes) -> dict[str, list[str]]:
    """Return what each worker noted, in order; lines are ``worker note``."""
    noted: dict[str, list[str]] = defaultdict(list)
    for line in notes.lines():
        worker, _, note = line.partition(" ")
        noted[worker].append(note)
    return noted


def with_a_resource(count: int, notes: Notes) -> Pipeline:
    """Return a pipeline of *count* ints with a resource that tells its worker, and notes its end."""
    pipeline = ints(count)

    @pipeline.resource
    def me() -> Iterator[str]:
        name = f"{os.getpid()}/{threading.get_ident()}/{len(notes.lines())}"
        notes.add(f"{name} open")
        yield name
        notes.add(f"{name} close")

    return pipeline


@pytest.mark.parametrize(
    "options", [{}, {"workers": 3}, {"ordered": True, "workers": 2}, {"rate": 1000.0}], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_worker_does_more_jobs_than_it_may(backend: str, options: dict[str, Any], notes: Notes) -> None:
    pipeline = with_a_resource(50, notes)

    @pipeline.consumer(max_tasks_per_worker=7, **options)
    def work(item: int, me: str) -> int:
        notes.add(f"{me} {item}")
        return item

    report = run(pipeline, backend)

    workers = by_worker(notes)
    assert all(noted[0] == "open" and noted[-1] == "close" for noted in workers.values())
    jobs = [noted[1:-1] for noted in workers.values()]
    assert max(map(len, jobs)) == 7
    assert sorted(int(item) for noted in jobs for item in noted) == list(range(50))
    assert (report.results if "ordered" in options else sorted(report.results)) == list(range(50))
    stage = report.stages["work"]
    assert (stage.worker_restarts, stage.redelivered, stage.retried) == (0, 0, 0)


@pytest.mark.parametrize("backend", PROCESSES)
def test_jobs_of_no_length_are_counted_like_others(backend: str) -> None:
    pipeline = ints(3000)

    @pipeline.consumer(max_tasks_per_worker=500, workers=2)
    def work(item: int) -> int:  # noqa: ARG001
        return os.getpid()

    results = run(pipeline, backend).results

    assert len(results) == 3000
    assert max(results.count(pid) for pid in set(results)) == 500


@pytest.mark.parametrize("kind", ["threads", "tasks", "batches"])
@pytest.mark.parametrize("backend", PROCESSES)
def test_lanes_share_what_their_worker_may_do_and_a_batch_counts_as_one(
    backend: str, kind: str, notes: Notes
) -> None:
    pipeline = ints(40)

    def one(item: int) -> int:
        notes.add(f"{os.getpid()} {item}")
        return item

    async def task(item: int) -> int:
        return one(item)

    def batch(items: list[int]) -> int:
        notes.add(f"{os.getpid()} {len(items)}")
        return len(items)

    function: Any = {"threads": one, "tasks": task, "batches": batch}[kind]
    options = {"batch": 4} if kind == "batches" else {"concurrency": 3}
    pipeline.consumer(function, name="work", max_tasks_per_worker=4, **options)

    report = run(pipeline, backend)

    assert report.stages["work"].done == 40
    assert [len(noted) for noted in by_worker(notes).values()] == (
        [4, 4, 2] if kind == "batches" else [4] * 10
    )


@pytest.mark.parametrize("backend", PROCESSES)
def test_workers_that_die_before_they_may_retire_lose_nothing(backend: str, notes: Notes) -> None:
    pipeline = ints(40)

    @pipeline.consumer(max_tasks_per_worker=3, workers=2)
    def work(item: int, job: Job) -> int:
        notes.add(f"{os.getpid()} {item}")
        if item % 10 == 5 and job.delivery == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    report = run(pipeline, backend)

    assert sorted(report.results) == list(range(40))
    assert max(map(len, by_worker(notes).values())) <= 3
    assert (report.stages["work"].worker_restarts, report.stages["work"].redelivered) == (4, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resource_that_fails_to_close_at_a_retirement_harms_no_job_and_is_told_at_the_end(
    backend: str, notes: Notes
) -> None:
    pipeline = ints(12)

    @pipeline.resource
    def broken() -> Iterator[int]:
        yield 1
        raise ConnectionError("can't be closed")

    @pipeline.consumer(max_tasks_per_worker=2)
    def work(item: int, broken: int) -> int:  # noqa: ARG001
        notes.add(item)
        return item

    with pytest.raises(RunFailed, match="can't be closed, while closing the resource broken") as caught:
        run(pipeline, backend)

    assert sorted(map(int, notes.lines())) == list(range(12))
    assert caught.value.report is not None
    assert caught.value.report.stages["work"].done == 12


@pytest.mark.parametrize("backend", PROCESSES)
def test_a_worker_that_does_not_come_to_its_end_is_stopped(backend: str, notes: Notes) -> None:
    pipeline = ints(4)

    @pipeline.resource
    def slow() -> Iterator[int]:
        yield 1
        signal.pause()

    @pipeline.consumer(max_tasks_per_worker=2)
    def work(item: int, slow: int) -> int:  # noqa: ARG001
        notes.add(item)
        return item

    report = run(pipeline, backend, shutdown_timeout=0.2)

    assert sorted(map(int, notes.lines())) == list(range(4))
    assert report.ok


@pytest.mark.parametrize("options", [{}, {"concurrency": 2}, {"workers": 2, "ordered": True}], ids=str)
@pytest.mark.parametrize("backend", PROCESSES)
def test_no_job_begins_in_a_worker_that_has_too_much_memory(
    backend: str, options: dict[str, Any], notes: Notes
) -> None:
    pipeline, kept = ints(20), []
    limit = resident() + 60 * MIB

    @pipeline.consumer(max_memory=limit, **options)
    def work(item: int) -> int:
        notes.add(f"{os.getpid()} {resident()} {item}")
        kept.append(bytearray(30 * MIB))
        return item

    report = run(pipeline, backend)

    assert sorted(report.results) == list(range(20))
    workers = by_worker(notes)
    assert len(workers) > 1
    lanes = options.get("concurrency", 1)  # jobs of other lanes go on
    for noted in workers.values():
        assert all(int(note.split()[0]) <= limit + SLACK + (lanes - 1) * 30 * MIB for note in noted)
    stage = report.stages["work"]
    assert (stage.worker_restarts, stage.redelivered) == (0, 0)


@pytest.mark.parametrize("backend", PROCESSES)
def test_a_worker_that_has_too_much_memory_from_the_start_does_its_job(backend: str, notes: Notes) -> None:
    pipeline = ints(8)

    @pipeline.consumer(max_memory=1)
    def work(item: int) -> int:
        notes.add(f"{os.getpid()} {item}")
        return item

    report = run(pipeline, backend)

    assert sorted(report.results) == list(range(8))
    assert len(by_worker(notes)) > 1


@pytest.mark.parametrize("backend", ["thread", "inline"])
def test_where_workers_are_no_processes_memory_is_nobodys(backend: str, notes: Notes) -> None:
    pipeline = with_a_resource(8, notes)

    @pipeline.consumer(max_memory=1)
    def work(item: int, me: str) -> int:  # noqa: ARG001
        return item

    assert run(pipeline, backend).stages["work"].done == 8
    assert len(by_worker(notes)) == 1


@pytest.mark.parametrize("options", [{}, {"batch": 1}, {"timeout": 60}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_after_a_memory_error_no_job_begins_in_that_worker(
    backend: str, options: dict[str, Any], notes: Notes
) -> None:
    pipeline = with_a_resource(30, notes)

    def one(item: int, me: str) -> int:
        notes.add(f"{me} {item}")
        return len(bytearray(2**60)) if item == 11 else item

    def batch(items: list[int], me: str) -> int:
        return one(items[0], me)

    pipeline.consumer(batch if "batch" in options else one, name="work", **options)

    report = run(pipeline, backend)

    assert [(letter.item, letter.error) for letter in report.dead] == [(11, "MemoryError")]
    assert sorted(report.results) == [item for item in range(30) if item != 11]
    failed = next(noted for noted in by_worker(notes).values() if "11" in noted)
    assert failed[-2:] == ["11", "close"]
    assert (report.stages["work"].worker_restarts, report.stages["work"].redelivered) == (0, 0)


@pytest.mark.parametrize("backend", PROCESSES)
def test_after_a_memory_error_jobs_of_no_length_go_elsewhere_too(backend: str) -> None:
    pipeline = ints(6000)

    @pipeline.consumer
    def work(item: int) -> int:
        if item == 3000:
            raise MemoryError
        return os.getpid() * 10_000 + item

    report = run(pipeline, backend)

    done = dict(divmod(result, 10_000)[::-1] for result in report.results)
    assert sorted(done) == [item for item in range(6000) if item != 3000]
    assert {done[item] for item in range(3000)}.isdisjoint({done[item] for item in range(3001, 6000)})


@pytest.mark.parametrize("options", [{}, {"concurrency": 3}], ids=str)
@pytest.mark.parametrize("backend", PROCESSES)
def test_a_job_without_memory_may_be_tried_again_in_another_worker(
    backend: str, options: dict[str, Any], notes: Notes
) -> None:
    pipeline = ints(10)

    @pipeline.consumer(max_retries=1, min_backoff=0.0, retry_on=MemoryError, **options)
    def work(item: int, job: Job) -> int:
        if item == 3:
            notes.add(os.getpid())
            if job.attempt == 1:
                raise MemoryError
        return item

    report = run(pipeline, backend)

    assert sorted(report.results) == list(range(10))
    first, second = notes.lines()
    assert first != second


class Large:
    """Can be loaded by nobody."""

    def __setstate__(self, _: object) -> None:
        raise MemoryError

    def __getstate__(self) -> dict[str, int]:
        return {"number": 1}


def test_an_item_that_finds_no_memory_is_a_dead_letter_and_its_worker_replaced(notes: Notes) -> None:
    pipeline = Pipeline("large")

    @pipeline.producer
    def things() -> Iterator[object]:
        yield Large()
        yield from map(str, range(5))

    @pipeline.resource
    def me() -> str:
        notes.add(os.getpid())
        return "me"

    @pipeline.consumer
    def work(item: object, me: str) -> str:  # noqa: ARG001
        return str(item)

    report = run(pipeline, "pipe")

    assert report.stages["work"].dead == 1
    assert sorted(report.results) == list("01234")
    assert len(notes.lines()) == 2


@pytest.mark.parametrize("option", ["max_tasks_per_worker", "max_memory"])
@pytest.mark.parametrize("value", [0, -1, 0.5, "1 GB"])
def test_limits_that_are_none_are_refused(option: str, value: object) -> None:
    with pytest.raises(PipelineError, match=rf"work\(\).*option {option}={value!r}"):
        Pipeline("wrong").consumer(lambda item: item, name="work", **{option: value})


def test_memory_is_looked_at_after_a_long_job_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    used = 100
    monkeypatch.setattr("jobq.retirement.resident", lambda: used)
    retirement = Retirement(200)

    assert not retirement.look(10 * LOOK_NS, 10 * LOOK_NS)
    used = 300
    assert retirement.look(10 * LOOK_NS + 1, 9 * LOOK_NS)  # of another lane, begun before that look


def test_memory_is_looked_at_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    used = 100
    monkeypatch.setattr("jobq.retirement.resident", lambda: used)
    retirement = Retirement(200)

    assert not retirement.look(LOOK_NS, LOOK_NS)
    used = 300
    assert not retirement.look(2 * LOOK_NS - 1, LOOK_NS)
    assert retirement.look(2 * LOOK_NS, LOOK_NS)
    assert retirement.look(2 * LOOK_NS + 1, 2 * LOOK_NS)
    assert retirement.why == "it has 300 bytes of memory, more than max_memory=200"
