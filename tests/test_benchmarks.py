"""The benchmarks' programs run and check their own results; how fast they are is no test."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import contestant
from benchmarks.contestant import Contestant, Load
from benchmarks.growth import CURVES, measure
from benchmarks.results import Round, ratios
from benchmarks.run import measured
from benchmarks.workloads import FAST, SLOW, WORKLOADS, Wrong, ideal

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["jobq-joinable", "raw-joinable"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_measurement_in_a_fresh_process_finds_its_results_right(workload: str, name: str) -> None:
    count = min(WORKLOADS[workload].quick, 200)

    found = measured(WORKLOADS[workload], name, count)

    assert found.get("count") == count, found
    assert found["value"] >= 0


@pytest.mark.parametrize("name", contestant.NAMES)
def test_every_contestant_is_measured_or_says_why_not(name: str) -> None:
    found = measured(WORKLOADS["W1"], name, 100)

    assert {"value", "absent"} & found.keys(), found


class Loser(Contestant):
    """Loses an item, or changes one."""

    def __init__(self, done: list[Any] | int) -> None:
        self.done = done

    def run(self, load: Load) -> list[Any] | int:  # noqa: ARG002  # it does something else
        """Return what it is told to."""
        return self.done


@pytest.mark.parametrize(("workload", "done"), [("W1", 9), ("W2-dicts", [{"id": 1}] * 10)])
def test_who_loses_or_changes_an_item_gets_no_number(workload: str, done: list[Any] | int) -> None:
    measured_workload = WORKLOADS[workload]

    with pytest.raises(Wrong):
        measured_workload.read(Loser(done), measured_workload.load(10))


def test_the_ideal_gives_each_job_in_turn_to_the_first_free_worker() -> None:
    assert ideal([3.0, 1.0, 1.0, 1.0]) == 3.0
    assert ideal([FAST, FAST, SLOW]) == FAST + SLOW


def test_ratios_are_taken_within_a_round() -> None:
    rounds: list[Round] = [
        {"pool": {"value": 10.0}, "raw-joinable": {"value": 5.0}},
        {"pool": {"value": 3.0}, "raw-joinable": {"failed": "no"}},
        {"pool": {"value": 8.0}, "raw-joinable": {"value": 2.0}},
    ]

    assert ratios(rounds, "pool") == [2.0, 4.0]


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("curve", CURVES)
def test_a_point_of_a_curve_says_what_an_item_and_a_chunk_cost(curve: str) -> None:
    found = measure(curve, CURVES[curve].points[1], "inline", items=200)

    assert found["items a chunk"] >= 1
