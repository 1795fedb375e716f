"""Outputs leave in the order of their jobs, whatever the order in which these ended."""

from __future__ import annotations

import random
from itertools import pairwise, permutations

import pytest

from jobq.ordering import Sequencer


def released(sequencer: Sequencer[str], *ended: int, gives: bool = True) -> list[str]:
    """Return what is released when jobs end in the order *ended*, each giving its number."""
    out: list[str] = []
    for number in ended:
        if gives:
            sequencer.add(number, str(number))
        sequencer.settle(number, 1)
        out += sequencer.release()
    return out


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_outputs_leave_in_order_whatever_the_order_of_the_ends(order: tuple[int, ...]) -> None:
    sequencer: Sequencer[str] = Sequencer()

    assert released(sequencer, *order) == ["0", "1", "2", "3"]
    assert sequencer.head == 4


def test_an_output_is_held_while_a_job_before_it_is_open() -> None:
    sequencer: Sequencer[str] = Sequencer()

    assert released(sequencer, 1, 2) == []
    assert released(sequencer, 0) == ["0", "1", "2"]


def test_an_output_leaves_as_soon_as_nobody_is_before_it() -> None:
    sequencer: Sequencer[str] = Sequencer()

    assert released(sequencer, 0) == ["0"]
    assert released(sequencer, 1) == ["1"]


def test_a_dead_or_filtered_job_leaves_no_gap() -> None:
    sequencer: Sequencer[str] = Sequencer()
    released(sequencer, 2)

    assert released(sequencer, 0, 1, gives=False) == ["2"]


def test_several_outputs_of_a_job_stay_together_and_in_order() -> None:
    sequencer: Sequencer[str] = Sequencer()
    for text in ("b1", "b2"):
        sequencer.add(1, text)
    sequencer.settle(1, 1)
    for text in ("a1", "a2"):
        sequencer.add(0, text)
    sequencer.settle(0, 1)

    assert sequencer.release() == ["a1", "a2", "b1", "b2"]


def test_a_run_of_jobs_is_settled_at_once() -> None:
    sequencer: Sequencer[str] = Sequencer()
    sequencer.add(3, "3-5")
    sequencer.settle(3, 3)
    sequencer.add(0, "0-2")
    sequencer.settle(0, 3)

    assert sequencer.release() == ["0-2", "3-5"]
    assert sequencer.head == 6


def test_the_first_job_gives_its_parts_before_it_has_ended() -> None:
    sequencer: Sequencer[str] = Sequencer()
    sequencer.add(0, "part 1")
    sequencer.add(1, "later")

    assert sequencer.release() == ["part 1"]
    sequencer.add(0, "part 2")
    sequencer.settle(1, 1)
    assert sequencer.release() == ["part 2"]
    sequencer.settle(0, 1)
    assert sequencer.release() == ["later"]


def test_the_next_job_gives_its_parts_as_soon_as_it_is_the_first() -> None:
    sequencer: Sequencer[str] = Sequencer()
    sequencer.add(1, "part of 1")
    assert sequencer.release() == []

    assert released(sequencer, 0) == ["0", "part of 1"]


def test_what_a_failed_job_gave_is_forgotten() -> None:
    sequencer: Sequencer[str] = Sequencer()
    sequencer.add(1, "first try")
    sequencer.drop(1)
    sequencer.add(1, "second try")
    sequencer.settle(1, 1)

    assert released(sequencer, 0) == ["0", "second try"]


def test_nothing_is_released_twice() -> None:
    sequencer: Sequencer[str] = Sequencer()
    released(sequencer, 0, 1)

    assert sequencer.release() == []


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_runs_and_gaps_comes_out_sorted(seed: int) -> None:
    chance = random.Random(seed)
    edges = sorted({0, 60, *chance.sample(range(1, 60), 15)})
    runs = list(pairwise(edges))
    chance.shuffle(runs)
    sequencer: Sequencer[int] = Sequencer()
    out: list[int] = []
    expected: list[int] = []

    for low, high in runs:
        for number in range(low, high):
            for _ in range(chance.choice((0, 1, 1, 3))):
                sequencer.add(number, number)
                expected.append(number)
        sequencer.settle(low, high - low)
        out += sequencer.release()

    assert out == sorted(expected)
    assert sequencer.head == 60
