"""Pipelines in the simulated world: what it injects, what it judges, and what it has found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobq import Job, Lock, Pipeline, PipelineError, Retry
from jobq import work as at_work
from jobq.driver import Driver
from jobq.scheduler import Scheduler
from jobq.testing import Faults, Simulation, SimulationFailed, simulate
from tests import simulated
from tests.planted_bugs import BUGS, ENOUGH, Bug, hunt, planted
from tests.simulated import ALL, ordered, plain

CALM = Faults(deaths=0, failures=0, delays=0, races=0, signals=0)


def only(**chances: float) -> Faults:
    """Return the faults that are named, and no others."""
    return Faults(**{"deaths": 0, "failures": 0, "delays": 0, "races": 0, "signals": 0, **chances})


def over(seeds: range, pipeline: Pipeline = plain, **given: Any) -> list[Simulation]:
    return [simulate(pipeline, seed=seed, **given) for seed in seeds]


# --- a run ---------------------------------------------------------------------------------------


def test_without_faults_a_run_ends_as_any_other() -> None:
    simulation = simulate(plain, seed=1, faults=CALM, count=30)

    report = simulation.report
    assert sorted(report.results) == [float(number) for number in range(30)]
    assert (report.ok, report.dead, report.stages["spelled"].done) == (True, [], 30)


def test_a_seed_gives_the_same_run_each_time() -> None:
    first, second, other = (simulate(ordered, seed=seed) for seed in (5, 5, 6))

    assert first.trace == second.trace
    assert first.report.stages == second.report.stages
    assert first.trace != other.trace


def test_a_seed_gives_the_same_run_in_every_process() -> None:
    code = (
        "from jobq.testing import simulate; from tests import simulated;"
        " print(simulate(simulated.wide, seed=3).trace)"
    )
    told = {
        subprocess.check_output(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parent.parent,
            timeout=60,
        )
        for seed in ("1", "2")
    }

    assert len(told) == 1


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ALL, ids=lambda pipeline: pipeline.name)
@pytest.mark.usefixtures("no_leaks")
def test_every_promise_holds_under_every_seed(pipeline: Pipeline) -> None:
    assert simulate(pipeline, seed=range(40)) == 40
    assert simulate(pipeline, seed=range(40, 60), max_failures=2) == 20
    assert simulate(pipeline, seed=range(60, 80), faults=Faults(signals=1), shutdown_timeout=0.05) == 20


@pytest.mark.usefixtures("no_leaks")
def test_functions_are_called_as_in_a_real_run() -> None:
    pipeline, opened, closed = Pipeline("real"), [], []

    @pipeline.resource
    def connection(path: str = "x") -> Iterator[str]:
        opened.append(path)
        yield path
        closed.append(path)

    @pipeline.resource(scope="run")
    def counts() -> dict[str, int]:
        return {"calls": 0}

    @pipeline.producer
    def give() -> Iterator[dict[str, int]]:
        yield from ({"number": number} for number in range(5))

    @pipeline.consumer(workers=2, max_retries=1)
    async def work(item: dict[str, int], connection: str, counts: dict[str, int], job: Job) -> str:
        with Lock("counts"):
            counts["calls"] += 1
        item["number"] += 10  # a rerun gets the item as it was
        if job.attempt == 1:
            raise Retry(delay=3600)
        return f"{item['number']} {connection} {counts['calls'] > 5}"

    simulation = simulate(pipeline, seed=1, faults=CALM, path="y")

    assert sorted(simulation.report.results) == [f"{10 + number} y True" for number in range(5)]
    assert simulation.report.seconds > 3600
    assert opened == closed == ["y", "y"]


def test_what_a_function_raises_is_a_dead_letter() -> None:
    report = simulate(ordered, seed=1, faults=CALM).report

    assert {(letter.item, letter.error, letter.attempts) for letter in report.dead} == {
        (5, "ValueError", 3),
        (16, "ValueError", 3),
    }


def test_run_options_are_those_of_a_run() -> None:
    crowded = simulate(plain, seed=1, faults=CALM, workers={"spelled": 5})
    stopped = simulate(ordered, seed=1, faults=CALM, max_failures=1)

    assert sum(event.__class__.__name__ == "WorkerStarted" for event in crowded.events) == 1 + 5 + 2
    assert stopped.report.stages["parsed"].cancelled > 0


@pytest.mark.parametrize("given", [{"output": "x.jsonl"}, {"nonsense": 1}, {"max_failures": 0}])
def test_what_makes_no_sense_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(PipelineError, match=next(iter(given))):
        simulate(plain, seed=1, **given)


def test_a_chance_is_from_0_to_1() -> None:
    with pytest.raises(PipelineError, match="deaths=2"):
        Faults(deaths=2)


# --- what goes wrong -----------------------------------------------------------------------------


def test_deaths_cost_deliveries_and_workers() -> None:
    runs = over(range(20), faults=only(deaths=0.1))

    assert any(" dies " in run.trace for run in runs)
    assert sum(stage.worker_restarts for run in runs for stage in run.report.stages.values()) > 0
    assert {letter.error for run in runs for letter in run.report.dead} == {"WorkerLost"}


def test_failures_cost_attempts() -> None:
    runs = over(range(20), faults=only(failures=0.1))

    assert sum(run.report.stages["spelled"].retried for run in runs) > 0
    assert {letter.error for run in runs for letter in run.report.dead} == {"InjectedFailure"}


def test_delays_let_jobs_be_taken_back() -> None:
    runs = over(range(20), faults=only(delays=0.2))

    assert any(" is taken back from " in run.trace for run in runs)
    assert all(run.report.ok for run in runs)


def test_races_let_answers_come_too_late() -> None:
    runs = over(range(60), faults=only(delays=0.2, races=1))

    assert sum(run.late for run in runs) > 0
    assert all(sorted(run.report.results) == [float(number) for number in range(50)] for run in runs)


def test_signals_stop_the_run() -> None:
    runs = over(range(20), faults=only(signals=1))

    assert any("a signal comes" in run.trace for run in runs)
    assert any(run.report.stages["spelled"].cancelled for run in runs)


# --- what is judged ------------------------------------------------------------------------------


def test_an_invariant_of_the_users_own_names_its_seed() -> None:
    def nothing_dies(run: Simulation) -> None:
        assert not run.report.dead, "a job was given up"

    with pytest.raises(SimulationFailed, match="a job was given up") as caught:
        simulate(plain, seed=range(100), faults=only(failures=0.2), invariant=nothing_dies)

    assert f"simulate(plain, seed={caught.value.seed}, faults=Faults(" in str(caught.value)
    assert simulate(plain, seed=caught.value.seed, faults=only(failures=0.2)).report.dead


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    with planted(bug):
        failed = hunt(range(ENOUGH))

    assert failed is not None


def test_the_seed_of_a_bug_shows_it_again() -> None:
    with planted(BUGS[0]):
        failed = hunt(range(ENOUGH), [plain])
        assert failed is not None
        with pytest.raises(SimulationFailed) as again:
            simulate(plain, seed=failed.seed)

    assert (str(again.value), again.value.trace) == (str(failed), failed.trace)
    assert f"simulate(plain, seed={failed.seed})" in str(failed)


def test_a_run_without_an_end_is_found() -> None:
    endless = Pipeline("endless")
    calls = [0]

    @endless.producer
    def start() -> Iterator[int]:
        yield 0

    @endless.consumer(source=["start", "again"])
    def again(number: int) -> int:
        calls[0] += 1
        if calls[0] > 200:
            raise AssertionError("the simulation has not noticed")
        return number

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobq.testing.world.WAITS", 100)
        with pytest.raises(SimulationFailed, match="does not end"):
            simulate(endless, seed=1, faults=CALM)


# --- what it has found: planted again, each fails under these seeds -------------------------------

SPINS_BEHIND_BUSY_WORKERS = Bug(
    "an overdue batch that waits for a worker keeps the driver going round",
    Driver, "_gives_at", "if overdue > self._gave_at:", "if True:",
)  # fmt: skip
SPINS_WHEN_HALTED = Bug(
    "retries that max_failures has cancelled keep the driver going round",
    Driver, "_patience", "giving = not (self.ending.halted or self.paused)", "giving = True",
)  # fmt: skip
KEEPS_WHAT_IS_HELD = Bug(
    "what an ordered stage held when the run was stopped is in nobody's books",
    Scheduler, "cancel", "if line.sequencer is not None:", "if False:",
)  # fmt: skip
FORGETS_DROPPED_PARTS = Bug(
    "what a job gave ahead and its failure dropped is in nobody's books",
    Scheduler, "_failed", "self._count_late(line, output.route, output.block.count)", "pass",
)  # fmt: skip
TAKES_LATE_PARTS = Bug(
    "parts of a job that was taken back count",
    Scheduler, "settle", "elif outputs and not asked:", "elif False:",
)  # fmt: skip


POLLS_BEHIND_A_BATCH = Bug(
    "behind a long batch the driver looks again and again whether there is something to take back",
    Driver, "_rebalance", "if line.batch is not None and", "if False and",
)  # fmt: skip


def test_the_driver_sleeps_while_a_batch_takes_long() -> None:
    with planted(POLLS_BEHIND_A_BATCH):
        restless = max(run.waits for run in over(range(20), simulated.batches))

    assert max(run.waits for run in over(range(20), simulated.batches)) < 200 < restless


BURIES_NEIGHBOURS = Bug(
    "a batch is given up for the one job that has had its deliveries",
    Scheduler, "_charge_batch",
    "if charged and part.delivery >= line.node.stage.consumer.max_deliveries:",
    "if charged and any(one.delivery >= line.node.stage.consumer.max_deliveries for one in parts):",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "pipeline", "seeds", "given"),
    [
        (SPINS_BEHIND_BUSY_WORKERS, simulated.batches, 30, {}),
        (SPINS_WHEN_HALTED, simulated.plain, 200, {"max_failures": 2}),
        (KEEPS_WHAT_IS_HELD, simulated.ordered, 60, {"faults": Faults(signals=1)}),
        (FORGETS_DROPPED_PARTS, simulated.streams, 200, {}),
        (BURIES_NEIGHBOURS, simulated.batches, 200, {"faults": Faults(deaths=0.15)}),
        (TAKES_LATE_PARTS, simulated.streams, 200, {"faults": Faults(races=1)}),
    ],
    ids=lambda value: value.what if isinstance(value, Bug) else "",
)
def test_what_it_has_found_is_mended(
    bug: Bug, pipeline: Pipeline, seeds: int, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_work, "HELD_OUTPUTS", 2)  # streams travel in parts
    with planted(bug), pytest.raises(SimulationFailed) as failed:
        simulate(pipeline, seed=range(seeds), **given)

    assert simulate(pipeline, seed=range(failed.value.seed + 1), **given) > failed.value.seed
