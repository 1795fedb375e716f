"""What the driver reads from a worker's page, and writes there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobq.backend import CLAIMED, IDLE, LANES, LIMIT, NO_LIMIT, Page, blank_page, page_words, past
from jobq.pool import Member, Pool


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


def test_only_jobs_in_hand_have_an_age() -> None:
    member = member_with(3, past(9), IDLE)
    member.worker.page[LANES + 1 :: 2] = [100, 200, 300]

    assert member.ages(1000) == [(3, 900)]
