"""Workers die at any instant: nothing is lost, by the evidence of the files that jobs write."""

# jobs take items, resources and jobs that they need not look at

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobq import Job
from tests.test_run import PROCESSES, Gate, Notes, counts, ints, run

#: Seconds that a worker may outlive its driver: one, and some for a busy machine.
SURVIVAL = 2.0

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(params=PROCESSES)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def die() -> None:
    """Be killed as by the kernel, now."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


def until(claim: Callable[[], bool]) -> None:
    """Return when *claim* is true; the time is a safety net only."""
    deadline = time.monotonic() + 20
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class DeadlyToLoad:
    """Kills whoever loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return die, ()


# --- the three instants --------------------------------------------------------------------------


def test_a_worker_killed_while_busy_is_replaced_within_a_second(backend: str, notes: Notes) -> None:
    pipeline = ints(200)

    @pipeline.consumer(workers=2)
    def work(i: int, job: Job) -> int:
        if i == 50:
            notes.add(f"at {time.monotonic()}")
            if job.delivery == 1:
                die()
        notes.add(f"did {i}")
        return i

    report = run(pipeline, backend)

    assert report.ok
    assert sorted(report.results) == list(range(200))
    assert {f"did {i}" for i in range(200)} <= set(notes.lines())
    died, again = (float(line.split()[1]) for line in notes.lines() if line.startswith("at"))
    assert again - died < 1.0 + 1.0  # and some for a busy machine
    stage = report.stages["work"]
    assert (stage.worker_restarts, stage.redelivered, stage.dead) == (1, 1, 0)


def test_workers_killed_again_and_again_lose_nothing(backend: str, notes: Notes) -> None:
    pipeline = ints(300)

    @pipeline.consumer(workers=2)
    def first(i: int, job: Job) -> Iterator[int]:
        if i % 60 == 17 and job.delivery == 1:
            die()
        yield from (i, -i - 1)

    @pipeline.consumer(workers=2)
    def second(i: int, job: Job) -> int:
        if i % 120 == 50 and job.delivery <= 2:
            die()
        notes.add(i)
        return i

    report = run(pipeline, backend)

    everything = sorted([*range(300), *(-i - 1 for i in range(300))])
    assert report.ok
    assert sorted(report.results) == everything
    assert {int(line) for line in notes.lines()} == set(everything)


# --- what kills ----------------------------------------------------------------------------------


@pytest.mark.parametrize("deliveries", [1, 3, 7])
def test_a_poison_job_is_a_dead_letter_after_exactly_max_deliveries(
    backend: str, notes: Notes, deliveries: int
) -> None:
    pipeline = ints(60)

    @pipeline.consumer(workers=2, max_deliveries=deliveries)
    def work(i: int, job: Job) -> int:
        if i == 30:
            notes.add(f"delivery {job.delivery}")
            die()
        notes.add(i)
        return i

    report = run(pipeline, backend)

    (letter,) = report.dead
    assert [line for line in notes.lines() if line.startswith("d")] == [
        f"delivery {n + 1}" for n in range(deliveries)
    ]
    assert (letter.item, letter.error, letter.deliveries, letter.stage) == (
        30,
        "WorkerLost",
        deliveries,
        "work",
    )
    assert "SIGKILL" in letter.message
    assert sorted(report.results) == [i for i in range(60) if i != 30]
    assert counts(report, "work") == (60, 59, 0, 1)


def test_jobs_beside_a_poison_job_in_one_worker_are_not_charged(
    backend: str, notes: Notes, gate: Gate
) -> None:
    pipeline = ints(3)

    @pipeline.consumer(concurrency=3, max_deliveries=1)
    def work(i: int) -> int:
        notes.add(i)
        if i == 1:
            until(lambda: len(set(notes.lines())) == 3)  # all three are in hand
            die()
        if notes.lines().count(str(i)) == 1:
            gate.wait()  # the first time for ever
        return i

    report = run(pipeline, backend)

    assert sorted(report.results) == [0, 2]
    assert [(letter.item, letter.error) for letter in report.dead] == [(1, "WorkerLost")]
    assert Counter(notes.lines()) == {"0": 2, "1": 2, "2": 2}


def test_a_batch_that_kills_its_worker_dies_item_by_item_and_the_rest_goes_on(
    backend: str, notes: Notes
) -> None:
    pipeline = ints(9)

    @pipeline.consumer(batch=3, batch_timeout=20.0, max_deliveries=2)
    def work(batch: list[int]) -> list[int]:
        if 4 in batch:
            notes.add(sorted(batch))
            die()
        return batch

    report = run(pipeline, backend)

    assert len(notes.lines()) == 2
    assert len(set(notes.lines())) == 1
    died = {letter.item for letter in report.dead}
    assert 4 in died
    assert str(sorted(died)) == notes.lines()[0]
    assert sorted(i for batch in report.results for i in batch) == sorted(set(range(9)) - died)


def test_an_ordered_stage_keeps_its_order_over_deaths(backend: str) -> None:
    pipeline = ints(80)

    @pipeline.consumer(workers=3, ordered=True, queue_size=5, max_deliveries=2)
    def work(i: int, job: Job) -> int:
        if i % 20 == 5 and (job.delivery == 1 or i == 45):
            die()
        return i

    report = run(pipeline, backend)

    assert report.results == [i for i in range(80) if i != 45]
    assert [letter.item for letter in report.dead] == [45]


# --- producers -----------------------------------------------------------------------------------


def test_a_producer_that_is_killed_is_one_dead_letter_and_what_it_gave_is_finished(
    backend: str, notes: Notes
) -> None:
    pipeline = ints(20)

    @pipeline.producer
    def killed() -> Iterator[int]:
        yield from range(100, 110)
        until(lambda: len(notes.lines()) == 30)
        die()

    @pipeline.consumer
    def work(i: int) -> int:
        notes.add(i)
        return i

    report = run(pipeline, backend)

    assert sorted(report.results) == [*range(20), *range(100, 110)]
    (letter,) = report.dead
    assert (letter.stage, letter.item, letter.job, letter.error) == ("killed", None, None, "WorkerLost")
    assert counts(report, "killed") == (11, 10, 0, 1)


# --- nobody waits for a slow job -----------------------------------------------------------------


@pytest.mark.parametrize("name", [*PROCESSES, "thread"])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_jobs_behind_a_slow_one_are_done_elsewhere_meanwhile(
    name: str, concurrency: int, notes: Notes, gate: Gate
) -> None:
    pipeline = ints(600)

    @pipeline.consumer(workers=2, concurrency=concurrency)
    def work(i: int) -> int:
        if i == 300:
            gate.wait()  # until all the others are through
        else:
            size = notes.add("x")
            if size == 2 * 599:
                gate.open()
        return i

    report = run(pipeline, name)
    gate.close()

    assert sorted(report.results) == list(range(600))
    assert len(notes.lines()) == 599  # nobody did anything twice
    assert report.ok
