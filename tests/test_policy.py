"""What becomes of a job that failed is decided by numbers alone."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jobq.policy import backoff_seconds, retry_delay
from jobq.stage import ConsumerOptions
from jobq.wire import Failure


class Chance:
    """Always gives the same place between the two ends: 0 the lower, 1 the upper."""

    def __init__(self, place: float) -> None:
        self.place = place

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) * self.place


LOW, HIGH = Chance(0.0), Chance(1.0)


def options(**given: Any) -> ConsumerOptions:
    return ConsumerOptions(**{"max_retries": 3, "min_backoff": 0.1, "max_backoff": 60.0, **given})


def failure(verdict: str = "error", **given: Any) -> Failure:
    return Failure(0, verdict, "ValueError", "no", "", **{"retriable": True, **given})


def test_a_back_off_doubles_with_each_attempt() -> None:
    assert [backoff_seconds(options(), attempt, HIGH) for attempt in (1, 2, 3, 4)] == pytest.approx(
        [0.2, 0.4, 0.8, 1.6]
    )


def test_chance_takes_at_most_half_of_a_back_off() -> None:
    assert [backoff_seconds(options(), attempt, LOW) for attempt in (1, 2, 3)] == pytest.approx(
        [0.1, 0.2, 0.4]
    )


def test_a_back_off_is_never_shorter_than_its_limit() -> None:
    assert backoff_seconds(options(), 1, LOW) == 0.1
    assert backoff_seconds(options(max_backoff=0.15), 5, LOW) == 0.1
    assert backoff_seconds(options(max_backoff=0.05), 1, LOW) == 0.05


@pytest.mark.parametrize("attempt", [11, 100, 10**6])
def test_a_back_off_is_never_longer_than_its_limit(attempt: int) -> None:
    assert backoff_seconds(options(), attempt, HIGH) == 60.0


def test_no_back_off_means_at_once() -> None:
    assert backoff_seconds(options(min_backoff=0), 5, HIGH) == 0.0
    assert backoff_seconds(options(max_backoff=0), 5, HIGH) == 0.0


@pytest.mark.parametrize(("attempt", "again"), [(1, True), (2, True), (3, True), (4, False), (5, False)])
def test_three_retries_are_four_calls(attempt: int, again: bool) -> None:
    assert (retry_delay(failure(), attempt, options(), HIGH) is not None) is again


def test_without_retries_the_first_failure_is_the_last() -> None:
    assert retry_delay(failure(), 1, options(max_retries=0), HIGH) is None


def test_an_error_of_a_type_that_is_not_retried_is_a_dead_letter() -> None:
    assert retry_delay(failure(retriable=False), 1, options(), HIGH) is None


@pytest.mark.parametrize("verdict", ["reject", "payload"])
def test_a_rejected_or_unfit_item_is_never_retried(verdict: str) -> None:
    assert retry_delay(failure(verdict), 1, options(), HIGH) is None


def test_a_job_that_asks_for_another_try_waits_as_long_as_it_says() -> None:
    assert retry_delay(failure("retry", delay=7.5), 1, options(), HIGH) == 7.5
    assert retry_delay(failure("retry", delay=0), 1, options(), HIGH) == 0


def test_a_job_that_asks_without_a_delay_gets_the_back_off() -> None:
    assert retry_delay(failure("retry"), 2, options(), HIGH) == pytest.approx(0.4)


def test_asking_works_whatever_types_are_retried() -> None:
    assert retry_delay(failure("retry", retriable=False), 1, options(), HIGH) is not None


def test_asking_counts_as_a_retry() -> None:
    assert retry_delay(failure("retry", delay=1.0), 4, options(), HIGH) is None


def test_every_delay_is_a_finite_number_of_seconds() -> None:
    delays = [
        backoff_seconds(options(), attempt, chance) for attempt in range(1, 80) for chance in (LOW, HIGH)
    ]

    assert all(math.isfinite(delay) and delay >= 0 for delay in delays)
