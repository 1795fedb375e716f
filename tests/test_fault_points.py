"""
A process of the run fails at any instant: nothing is lost, nothing enters a stage twice, nothing hangs.

The instants are those of `jobq.faults`. What became of the items is judged by what the jobs wrote.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from jobq import Job, Pipeline, Report, RunFailed, faults
from jobq.faults import PASSING, Fault
from tests.test_deaths import SURVIVAL, die, until
from tests.test_examples import session_members
from tests.test_run import PROCESSES, Notes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks", "disarmed")]

ITEMS = 20
#: Seconds in which each run ends.
SOON = 5.0
PASSINGS = range(1, 6)
WORKERS = sorted(point for point in faults.POINTS if point.startswith("worker."))
PRODUCERS = sorted(point for point in faults.POINTS if point.startswith("producer."))
DRIVERS = sorted(point for point in faults.POINTS if point.startswith("driver.") and "respawn" not in point)
#: What happens, and at which passings.
DEATHS = [*itertools.product(("kill", "exit"), PASSINGS), ("raise", 1), ("raise", 3)]
DELAYS = [*itertools.product(("stop", "sleep"), (1, 3))]

TWENTY = """
from collections.abc import Iterator
from jobq import Pipeline

pipeline = Pipeline("twenty")

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(20)

@pipeline.consumer
def same(i: int) -> int:
    return i
"""


@pytest.fixture
def disarmed() -> Iterator[None]:
    yield
    faults.arm(None)


@pytest.fixture(params=PROCESSES)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Trial:
    """Two stages of 20 items, what their jobs wrote, and who passed the point."""

    def __init__(self, folder: Path, name: str, *, dying: bool = False) -> None:
        self.notes = Notes(folder / f"{name}.notes")
        self.passings = folder / f"{name}.passings"
        self.pipeline = pipeline = Pipeline("trial")
        notes = self.notes  # five workers: each point is passed at least five times

        @pipeline.producer
        def numbers() -> Iterator[int]:
            yield from range(ITEMS)

        @pipeline.consumer(workers=1 if dying else 2, queue_size=4, max_deliveries=4)
        def first(i: int, job: Job) -> int:
            if dying and i == 3 and job.delivery == 1:
                die()
            return i

        @pipeline.consumer(workers=3, max_deliveries=4)
        def second(i: int, job: Job) -> int:
            notes.add(f"{i} {job.id}")
            return i

    def run(self, point: str, n: int, action: str, backend: str) -> Report:
        """Run with the fault set; return the report if it ended in time."""
        faults.arm(f"{point}:{n}={action}@{self.passings}")
        began = time.monotonic()
        try:
            report = self.pipeline.run(backend=backend, start_method="fork", check=False, collect=True)
        finally:
            faults.arm(None)
        assert time.monotonic() - began < SOON
        return report

    def passed(self) -> list[int]:
        """Return the numbers of the processes that passed the point, in order."""
        data = self.passings.read_bytes() if self.passings.exists() else b""
        return [pid for (pid,) in PASSING.iter_unpack(data)]

    def entered(self) -> list[int]:
        """Return the items that entered the second stage, once for each time that they did."""
        jobs = {tuple(line.split()) for line in self.notes.lines()}  # a job that ran again is one line
        return sorted(int(item) for item, _ in jobs)


@contextlib.contextmanager
def going_on(trial: Trial, n: int) -> Iterator[None]:
    """Inside the ``with`` the *n*-th to pass, once it has stopped, is told to go on."""

    def tell() -> None:
        while not over.wait(0.005):
            for pid in trial.passed()[n - 1 : n]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    over = threading.Event()
    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def assert_pointless(failed: RunFailed, trial: Trial, action: str) -> None:
    """The first worker of all ended by itself, and no other was up yet: there is no reason to try on."""
    assert action != "kill"
    assert "the first worker ended before it was ready" in str(failed)
    assert trial.entered() == []


# --- workers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", WORKERS)
def test_a_consumer_s_worker_may_fail_anywhere(point: str, backend: str, tmp_path: Path) -> None:
    for action, n in DEATHS:
        trial = Trial(tmp_path, f"{action}-{n}")
        try:
            report = trial.run(point, n, action, backend)
        except RunFailed as failed:
            assert_pointless(failed, trial, action)
            continue

        assert len(trial.passed()) >= n, "the fault never happened"
        if action == "raise" and point.endswith("_work"):  # as if the job had raised
            (letter,) = report.dead
            assert letter.error == "Fault"
            assert sorted([*report.results, letter.item]) == list(range(ITEMS))
        else:
            assert report.dead == []
            assert sorted(report.results) == trial.entered() == list(range(ITEMS))


@pytest.mark.parametrize("point", WORKERS)
def test_a_consumer_s_worker_may_stop_or_dawdle_anywhere(point: str, backend: str, tmp_path: Path) -> None:
    for action, n in DELAYS:
        trial = Trial(tmp_path, f"{action}-{n}")
        with going_on(trial, n):
            report = trial.run(point, n, action, backend)

        assert len(trial.passed()) >= n, "the fault never happened"
        assert sorted(report.results) == trial.entered() == list(range(ITEMS))
        assert all(stage.worker_restarts == 0 for stage in report.stages.values())


# --- producers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("point", PRODUCERS)
def test_of_a_producer_that_fails_anywhere_what_it_gave_is_finished(
    point: str, backend: str, tmp_path: Path
) -> None:
    for action, n in DEATHS:
        trial = Trial(tmp_path, f"{action}-{n}")
        try:
            report = trial.run(point, n, action, backend)
        except RunFailed as failed:
            assert_pointless(failed, trial, action)
            continue
        given = report.stages["numbers"].done

        assert len(trial.passed()) >= n, "the fault never happened"
        assert sorted(report.results) == trial.entered() == list(range(given))
        assert [letter.stage for letter in report.dead] == ["numbers"] * (not report.ok)
        assert report.ok == (given == ITEMS), "it ended by itself exactly if nothing is missing"


@pytest.mark.parametrize("point", PRODUCERS)
def test_a_producer_may_stop_or_dawdle_anywhere(point: str, backend: str, tmp_path: Path) -> None:
    for action, n in DELAYS:
        trial = Trial(tmp_path, f"{action}-{n}")
        with going_on(trial, n):
            report = trial.run(point, n, action, backend)

        assert len(trial.passed()) >= n, "the fault never happened"
        assert sorted(report.results) == trial.entered() == list(range(ITEMS))


def nobody_of(session: int) -> bool:
    """Whether no process of the session runs; those that nobody has reaped yet don't."""
    return all(" Z " in one for one in session_members(session))


# --- the driver ----------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["kill", "exit"])
@pytest.mark.parametrize("point", [*DRIVERS, "driver.respawn"])
def test_no_worker_outlives_a_driver_that_dies_anywhere(
    point: str, action: str, backend: str, tmp_path: Path
) -> None:
    for n in PASSINGS if point != "driver.respawn" else (1,):
        trial = Trial(tmp_path, str(n), dying=point == "driver.respawn")
        driver = os.fork()
        if driver == 0:
            os.setsid()
            with contextlib.suppress(BaseException):
                trial.run(point, n, action, backend)
            os._exit(1)  # it did not happen
        _, status = os.waitpid(driver, 0)
        died = time.monotonic()

        assert (
            os.waitstatus_to_exitcode(status) == {"kill": -signal.SIGKILL, "exit": faults.EXIT_CODE}[action]
        )
        until(partial(nobody_of, driver))
        assert time.monotonic() - died < SURVIVAL
        entered = trial.entered()
        assert len(entered) == len(set(entered)), "nothing enters a stage twice"


@pytest.mark.parametrize("point", [*DRIVERS, "driver.respawn"])
def test_a_driver_that_raises_anywhere_ends_its_run_with_that_error(
    point: str, backend: str, tmp_path: Path
) -> None:
    for n in PASSINGS if point != "driver.respawn" else (1,):
        trial = Trial(tmp_path, str(n), dying=point == "driver.respawn")

        with pytest.raises(Fault, match=f"{point}, passing {n}"):
            trial.run(point, n, "raise", backend)


@pytest.mark.parametrize("point", DRIVERS)
def test_a_driver_in_a_thread_of_its_own_that_raises_tells_whoever_waits(
    point: str, backend: str, tmp_path: Path
) -> None:
    streamed, opened = Trial(tmp_path, "streamed"), Trial(tmp_path, "opened")

    faults.arm(f"{point}:3=raise@{streamed.passings}")
    with pytest.raises(Fault, match=point), streamed.pipeline.stream(backend=backend) as stream:
        list(stream)
    faults.arm(f"{point}:3=raise@{opened.passings}")
    with pytest.raises(Fault, match=point), opened.pipeline.open(backend=backend) as run:
        for i in range(ITEMS):
            run.submit(i).result(timeout=SOON)


@pytest.mark.parametrize("error", ["EAGAIN", "EMFILE", "ENOMEM"])
def test_where_the_system_refuses_a_replacement_it_is_asked_again(
    error: str, backend: str, tmp_path: Path
) -> None:
    trial = Trial(tmp_path, error, dying=True)

    report = trial.run("driver.respawn", 1, error, backend)

    assert len(trial.passed()) == 2  # refused, then granted
    assert sorted(report.results) == trial.entered() == list(range(ITEMS))
    assert report.stages["first"].worker_restarts == 1


# --- the points themselves -----------------------------------------------------------------------


def test_without_a_file_each_process_counts_its_own_passings(tmp_path: Path) -> None:
    """So every replacement fails like the worker before it, which ends the run."""
    trial = Trial(tmp_path, "loop")
    faults.arm("worker.before_recv:1=kill")

    with pytest.raises(RunFailed, match="5 workers in a row ended before they finished a job"):
        trial.pipeline.run(start_method="fork")

    assert trial.entered() == []


@pytest.mark.parametrize("text", ["worker.nowhere", "worker.started=explode", "started:1"])
def test_a_fault_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not point\[:n\]\[=action\]\[@file\]"):
        faults.arm(text)


def test_the_environment_sets_a_fault_in_every_process(tmp_path: Path) -> None:
    """Also in those that are not forked from this one."""
    passings = tmp_path / "passings"
    (tmp_path / "twenty.py").write_text(TWENTY)

    done = subprocess.run(
        [sys.executable, "-m", "jobq.cli", "run", "twenty.py", "--start-method", "spawn", "-o", "-"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JOBQ_FAULT": f"worker.after_work:2=kill@{passings}",
        },
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert "was killed by SIGKILL" in done.stderr
    assert sorted(map(int, done.stdout.split())) == list(range(ITEMS))
    assert passings.stat().st_size > PASSING.size * ITEMS  # at least one ran again
