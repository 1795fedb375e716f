"""Source items are settled with the last of their descendants."""

from __future__ import annotations

from jobq.lineage import Lineage
from jobq.wire import Failure, References


def failure(text: str) -> Failure:
    return Failure(0, "error", "ValueError", text, "")


def entered(*roots: int, jobs: int = 1) -> Lineage:
    """Return a lineage in which each of *roots* has so many jobs."""
    lineage = Lineage()
    lineage.begin(roots)
    for root in roots:
        lineage.add([root] * jobs)
    lineage.end(roots, counts=False)
    return lineage


def test_an_item_that_enters_nowhere_is_settled_with_nothing() -> None:
    lineage = entered(7, jobs=0)

    ((root, fate),) = lineage.settled

    assert (root, fate.result, fate.failure, fate.cancelled) == (7, None, None, False)
    assert len(lineage) == 0


def test_an_item_is_settled_with_its_last_descendant_and_not_before() -> None:
    lineage = entered(1, jobs=2)

    lineage.add([1, 1])
    lineage.end([1])
    lineage.end([1, 1])

    assert not lineage.settled
    lineage.end([1])
    assert [root for root, _ in lineage.settled] == [1]


def test_the_result_that_came_last_is_kept_of_each_item() -> None:
    lineage = entered(1, 2)

    lineage.gave((1, 2, 1), References(["a", "b", "c"]))
    lineage.end([1, 2])

    results = {root: fate.result for root, fate in lineage.settled}
    assert results == {1: References(["c"]), 2: References(["b"])}


def test_the_first_failure_is_kept() -> None:
    lineage = entered(1, jobs=2)

    for text in ("one", "two"):
        lineage.died([1], failure(text), "work", None)
        lineage.end([1])

    ((_, fate),) = lineage.settled
    assert fate.failure == (failure("one"), "work", None)


def test_cancelling_a_descendant_settles_it() -> None:
    lineage = entered(1, 2)

    lineage.cancelled([1])

    ((root, fate),) = lineage.settled
    assert (root, fate.cancelled) == (1, True)
    assert len(lineage) == 1


def test_an_item_is_untouched_until_a_job_of_it_has_ended() -> None:
    lineage = entered(1, jobs=2)

    assert lineage.untouched(1) == 2
    lineage.add([1])
    lineage.end([1])
    assert lineage.untouched(1) is None
    assert lineage.untouched(5) is None


def test_a_family_s_descendants_are_every_member_s() -> None:
    lineage = entered(7, 8, jobs=1)
    family = lineage.family((7, 8, 7))
    lineage.add([family])
    lineage.forget(family)
    lineage.end([7, 8])

    assert (len(lineage), lineage.settled) == (2, [])
    lineage.end([family])

    assert sorted(root for root, _ in lineage.settled) == [7, 8]
    assert (lineage._families, lineage._members) == ({}, {})


def test_a_family_of_one_is_itself_and_families_may_meet() -> None:
    lineage = entered(7, 8, 9, jobs=1)

    assert lineage.family([7, 7]) == 7
    pair = lineage.family([7, 8])
    all_three = lineage.family([pair, 9])
    assert lineage._each(all_three) == (7, 8, 9)

    lineage.forget(pair)
    lineage.forget(all_three)
    assert not lineage._families
