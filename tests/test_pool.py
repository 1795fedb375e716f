"""What the driver reads from a worker's page, and writes there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobq.backend import CLAIMED, IDLE, LANES, LIMIT, NO_LIMIT, Page, blank_page, page_words, past
from jobq.driver import Driver
from jobq.pool import SLOW_SECONDS, Member, Pool


def member_with(*lanes: int) -> Member:
    """Return a worker whose lanes show these words."""
    page: Page = [0] * page_words(len(lanes))
    blank_page(page)
    page[LANES::2] = list(lanes)
    return Member(cast("Pool", None), 0, cast("Any", SimpleNamespace(page=page)))


@pytest.mark.parametrize(
    ("lanes", "in_hand", "first_not_begun"),
    [
        ((IDLE,), [], 0),
        ((0,), [0], 1),
        ((past(0),), [], 1),
        ((IDLE, IDLE), [], 0),
        ((3, past(9)), [3], 10),  # the answer of 4 to 9 may be under way
        ((past(2), past(1)), [], 3),
        ((3, 4), [3, 4], 5),
    ],
)
def test_what_was_begun_is_not_taken_back_though_it_is_not_in_hand_any_more(
    lanes: tuple[int, ...], in_hand: list[int], first_not_begun: int
) -> None:
    member = member_with(*lanes)

    assert member.tickets() == in_hand
    assert member.stop_beginning() == first_not_begun
    assert member.worker.page[LIMIT] == first_not_begun
    member.allow_all()
    assert member.worker.page[LIMIT] == NO_LIMIT


def test_what_is_claimed_may_have_begun() -> None:
    member = member_with(3)
    member.worker.page[CLAIMED] = 6

    assert member.tickets() == [3, 4, 5]
    assert member.stop_beginning() == 6


def test_a_claim_from_behind_the_limit_does_not_lift_it() -> None:
    """A worker shows its claim, then looks at the limit: in between the driver may look once more."""
    member = member_with(3)
    assert member.stop_beginning() == 4
    member.worker.page[CLAIMED] = 6

    assert member.stop_beginning() == 6
    assert member.worker.page[LIMIT] == 4


def test_only_jobs_in_hand_have_an_age() -> None:
    member = member_with(3, past(9), IDLE)
    member.worker.page[LANES + 1 :: 2] = [100, 200, 300]

    assert member.ages(1000) == [(3, 900)]


# --- jobs behind slow ones --------------------------------------------------------------------------


class Busy:
    """A worker with *load* jobs, the first of which takes long."""

    def __init__(self, load: int) -> None:
        self.load = load
        self.ready = self.open = self.has_more_to_give_back = True
        self.recalled = 0
        self.sample, self.sampled_at = IDLE, 0.0

    def begun(self) -> int:
        return 0

    def tickets(self) -> list[int]:
        return [0] if self.load else []


def test_the_check_for_slow_jobs_stays_as_long_as_one_has_others_behind_it() -> None:
    early, late, idle, other = members = [Busy(2), Busy(1), Busy(0), Busy(0)]
    line: Any = SimpleNamespace(name="work", each=1, ready=0, flying=3, batch=None)
    pool: Any = SimpleNamespace(line=line, members=members)
    driver: Any = Driver.__new__(Driver)
    driver._checks = {}
    driver.scheduler = SimpleNamespace(startable=lambda _: 1)

    def take_back(member: Busy) -> None:
        line.ready += member.load - 1
        member.load = 1

    def give(_: object) -> None:
        while line.ready:
            line.ready -= 1
            min(members, key=lambda member: member.load).load += 1

    driver._take_back, driver._give_chunks = take_back, give

    driver._rebalance(pool, 0.0)  # sees the first job of `early`
    late.load, line.flying = 2, 4  # which comes just before the first look that finds it slow
    driver._rebalance(pool, SLOW_SECONDS)
    assert [member.load for member in members] == [1, 2, 1, 0]

    while driver._checks:  # as the driver does, which sleeps where there is none
        driver._rebalance(pool, max(driver._checks.values()))

    assert [early.load, late.load, idle.load, other.load] == [1, 1, 1, 1]


@pytest.mark.parametrize(("looked_at", "due"), [(10.9, [11.0]), (11.0, [])])
def test_a_batch_that_became_overdue_since_the_last_look_is_due(looked_at: float, due: list[float]) -> None:
    options = SimpleNamespace(batch_timeout=1.0)
    node = SimpleNamespace(stage=SimpleNamespace(consumer=options))
    line: Any = SimpleNamespace(batch=3, oldest=10.0, node=node, delayed=[])
    driver: Any = Driver.__new__(Driver)
    driver._gave_at = looked_at

    assert list(driver._gives_at(SimpleNamespace(line=line, call_at=None))) == due
