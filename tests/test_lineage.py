"""Source items are settled with the last of their descendants."""

from __future__ import annotations

from jobq.lineage import Lineage
from jobq.wire import Failure, References


def failure(text: str) -> Failure:
    return Failure(0, "error", "ValueError", text, "")


def entered(*roots: int, jobs: int = 1) -> Lineage:
    """Return a lineage in which each of *roots* has so many jobs."""
    lineage = Lineage()
    for root in roots:
        lineage.begin(root)
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
