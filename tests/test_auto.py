"""Runs with ``workers="auto"``: workers come where jobs wait, go where there are none; nothing is lost."""

from __future__ import annotations

import errno
import itertools
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from jobq import Job, Pipeline, PipelineError, allotment
from jobq.allotment import Habit, cores, thread_times
from jobq.backend import Worker
from jobq.backends.processes import ProcessBackend
from jobq.shares import Seen, Shares
from jobq.testing import simulate
from tests.simulated import ALL
from tests.test_run import BACKENDS, PROCESSES, Notes, ints, run

pytestmark = pytest.mark.usefixtures("no_leaks")

#: More than the cores give a stage by themselves.
BEYOND_CORES = math.ceil(cores(threads=False)) + 1
#: Seconds after which a test is content to fail.
TOO_LONG = 40.0


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


def me() -> int:
    """Return a number that no other worker has, be it a process or a thread."""
    return threading.get_native_id()


def workers_of(stage: str, notes: Notes) -> set[str]:
    """Return who noted jobs of *stage*; lines are ``stage worker``."""
    return {line for line in notes.lines() if line.startswith(f"{stage} ")}


@pytest.mark.parametrize("backend", [*PROCESSES, "thread"])
def test_a_stage_that_waits_gets_more_workers_than_there_are_cores(backend: str, notes: Notes) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        until = time.monotonic() + TOO_LONG
        while len(workers_of("wait", notes)) <= BEYOND_CORES and time.monotonic() < until:
            yield from range(20)

    @pipeline.consumer(workers="auto", queue_size=50)
    def wait(item: int) -> int:
        time.sleep(0.005)
        notes.add(f"wait {me()}")
        return item

    report = run(pipeline, backend)

    assert len(workers_of("wait", notes)) > BEYOND_CORES
    assert len(notes.lines()) == report.stages["wait"].done == len(report.results)
    assert report.stages["wait"].worker_restarts == 0


@pytest.mark.parametrize("backend", ["pipe", "thread"])
def test_workers_move_to_the_stage_that_has_most_to_do(backend: str, notes: Notes) -> None:
    pipeline = Pipeline("test")

    @pipeline.resource
    def room() -> Iterator[None]:
        yield
        notes.add(f"left {me()}")

    @pipeline.producer
    def phases() -> Iterator[str]:
        until = time.monotonic() + TOO_LONG
        while len(workers_of("first", notes)) <= BEYOND_CORES and time.monotonic() < until:
            yield from ["first"] * 20
        while time.monotonic() < until and (
            len(workers_of("second", notes)) <= BEYOND_CORES or not workers_of("left", notes)
        ):
            yield from ["second"] * 20

    @pipeline.consumer(workers="auto", queue_size=50)
    def first(phase: str, room: None) -> str:  # noqa: ARG001
        if phase == "first":
            time.sleep(0.005)
            notes.add(f"first {me()}")
        return phase

    @pipeline.consumer(workers="auto", queue_size=50)
    def second(phase: str) -> str:
        if phase == "second":
            time.sleep(0.005)
            notes.add(f"second {me()}")
        return phase

    report = run(pipeline, backend)

    # The producer looked before the run's own end let the rest go.
    lines = notes.lines()
    last_job = max(number for number, line in enumerate(lines) if line.startswith("second"))
    assert any(line.startswith("left") for line in lines[:last_job])
    assert len(workers_of("second", notes)) > BEYOND_CORES
    assert [report.results.count(phase) for phase in ("first", "second")] == [
        sum(line.startswith(phase) for line in lines) for phase in ("first", "second")
    ]


@pytest.fixture
def swinging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the number of workers swing whenever they are all up, instead of being decided."""
    sizes = itertools.cycle([4, 1, 3, 2, 5, 1])

    def look(_: Shares, __: float, seen: Mapping[str, Seen], ___: float) -> dict[str, int]:
        return {name: next(sizes) for name, one in seen.items() if not one.changing}

    monkeypatch.setattr(Shares, "look", look)
    monkeypatch.setattr(allotment, "LOOK_SECONDS", 0.003)


@pytest.mark.usefixtures("swinging")
@pytest.mark.parametrize(
    "options", [{}, {"ordered": True}, {"batch": 3}, {"concurrency": 2}, {"max_tasks_per_worker": 9}], ids=str
)
@pytest.mark.parametrize("backend", [*PROCESSES, "thread"])
def test_nothing_is_lost_while_workers_come_and_go(
    backend: str, options: dict[str, Any], notes: Notes
) -> None:
    pipeline = Pipeline("test")

    def workers() -> int:
        return len({line.split()[0] for line in notes.lines()})

    @pipeline.producer
    def numbers() -> Iterator[int]:
        until = time.monotonic() + TOO_LONG
        for number in itertools.count():
            if number >= 400 and number % 50 == 0 and (workers() > 4 or time.monotonic() > until):
                return
            yield number

    def one(item: int) -> int:
        time.sleep(0.001)
        notes.add(f"{me()} {item}")
        return item

    def some(items: list[int]) -> Iterator[int]:
        return iter([one(item) for item in items])

    pipeline.consumer(
        some if "batch" in options else one, name="work", workers="auto", queue_size=50, **options
    )

    report = run(pipeline, backend)

    done = list(range(report.stages["numbers"].done))
    assert sorted(report.results) == done
    assert "ordered" not in options or report.results == done
    assert {int(line.split()[1]) for line in notes.lines()} == set(done)
    assert workers() > 4
    assert (report.stages["work"].worker_restarts, report.stages["work"].redelivered) == (0, 0)


@pytest.mark.usefixtures("swinging")
@pytest.mark.parametrize("backend", PROCESSES)
def test_nothing_is_lost_while_workers_come_and_go_and_are_killed(backend: str, notes: Notes) -> None:
    pipeline = ints(400)

    @pipeline.consumer(workers="auto")
    def work(item: int, job: Job) -> int:
        time.sleep(0.001)
        notes.add(f"{me()} {item}")
        if item % 20 == 10 and job.delivery == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    report = run(pipeline, backend)

    assert sorted(report.results) == list(range(400))
    assert {int(line.split()[1]) for line in notes.lines()} == set(range(400))
    assert report.stages["work"].redelivered == 20
    assert report.stages["work"].worker_restarts <= 20  # who was leaving anyway is not replaced


@pytest.mark.parametrize("pipeline", ALL, ids=lambda pipeline: pipeline.name)
def test_nothing_is_lost_in_a_simulated_world(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(1)

    def look(_: Shares, __: float, seen: Mapping[str, Seen], ___: float) -> dict[str, int]:
        return {name: chance.randint(1, 5) for name, one in seen.items() if one.workers}

    monkeypatch.setattr(Shares, "look", look)
    monkeypatch.setattr(allotment, "LOOK_SECONDS", 0.004)

    assert simulate(pipeline, range(3), workers="auto") == 3


@pytest.mark.parametrize("backend", PROCESSES)
def test_where_the_system_refuses_more_workers_the_run_goes_on_with_those_it_has(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    start = ProcessBackend.start

    def refusing(self: ProcessBackend, name: str, recipe: str) -> Worker:
        if len(started) >= 4:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(name)
        return start(self, name, recipe)

    monkeypatch.setattr(ProcessBackend, "start", refusing)
    monkeypatch.setattr(Shares, "look", lambda _, __, seen, ___: dict.fromkeys(seen, 6))
    monkeypatch.setattr(allotment, "LOOK_SECONDS", 0.003)
    monkeypatch.setattr(allotment, "cores", lambda **_: 1.0)
    pipeline = ints(100)

    @pipeline.consumer(workers="auto")
    def work(item: int) -> int:
        time.sleep(0.001)
        return item

    report = run(pipeline, backend)

    assert started == ["numbers-1", "work-1", "work-2.2", "work-3.3"]
    assert sorted(report.results) == list(range(100))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_run_ends(backend: str) -> None:
    pipeline = ints(0)

    @pipeline.consumer(workers="auto")
    def work(item: int) -> int:
        return item

    assert run(pipeline, backend).stages["work"].received == 0


def test_all_consumers_or_some_can_be_made_automatic_for_a_run() -> None:
    pipeline = ints(10)

    @pipeline.consumer(workers=2)
    def work(item: int) -> int:
        return item

    for workers in ("auto", {"work": "auto"}):
        assert sorted(run(pipeline, "pipe", workers=workers).results) == list(range(10))
    with pytest.raises(PipelineError, match=r"numbers\(\) .*: 'auto' is for consumers"):
        run(pipeline, "pipe", workers={"numbers": "auto"})
    with pytest.raises(PipelineError, match="workers"):
        run(pipeline, "pipe", workers="most")
    with pytest.raises(PipelineError, match="workers='auto'"):
        pipeline.producer(lambda: [1], name="more", workers="auto")


def test_the_kernel_tells_what_a_thread_has_computed() -> None:
    own = f"/proc/self/task/{threading.get_native_id()}"
    before = (thread_times(own) or {})[own][0]
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass

    after = (thread_times(own) or {})[own][0]
    assert after - before >= 0.045
    assert (thread_times("/proc/self/task/*") or {})[own][0] >= after
    assert thread_times("/proc/none/task/*") is None


@pytest.mark.parametrize(
    ("computed", "ready", "load"),
    [
        (0.1, 0.0, 1.0),  # it computes
        (0.01, 0.09, 1.0),  # so it does, with a tenth of a core
        (0.0, 0.0, 0.0),  # it waits
        (0.001, 0.0, 0.01),
        (0.001, 0.08, 0.05),  # on a busy machine: it is late to wait again
        (0.05, 0.0, 0.5),
        (0.025, 0.05, 0.5),  # half of each, with half a core
    ],
)
def test_how_busy_the_machine_is_is_no_habit_of_a_thread(computed: float, ready: float, load: float) -> None:
    habit = Habit(0.0, 0.0, 0.0)

    looks = [habit.look(0.1 * n, computed * n, ready * n) for n in range(1, 9)]

    assert looks == pytest.approx([load] * 8)


def test_what_the_kernel_tells_late_counts_in_the_end() -> None:
    habit = Habit(0.0, 0.0, 0.0)

    looks = [habit.look(0.1 * n, 0.01 * n, 0.18 * (n // 2)) for n in range(1, 21)]

    assert min(looks[10:]) > 0.2
    assert max(looks) == 1.0


def test_a_quota_counts_as_so_many_cores_and_threads_share_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(allotment, "QUOTA", quota)
    everything = cores(threads=False)

    quota.write_text("50000 100000\n")
    assert (cores(threads=False), cores(threads=True)) == (0.5, 1.0)
    quota.write_text("max 100000\n")
    assert cores(threads=False) == everything >= 1
