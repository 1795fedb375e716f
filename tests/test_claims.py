"""Jobs that are claimed together: each is done once, a slow one holds up nobody, a deadly one is found."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from jobq import JobsFailed
from jobq.backend import CLAIMED, IDLE, LANES, LIMIT, NO_LIMIT, blank_page, page_words
from jobq.claims import Claims
from jobq.wire import ReferenceCodec
from tests.test_deaths import until
from tests.test_run import PROCESSES, Notes, ints, run
from tests.test_work import Bench

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(autouse=True)
def claiming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every job count as one of no length; workers are forked, and so know it too."""
    monkeypatch.setattr("jobq.work.QUICK_SECONDS", 1e9)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


# --- the claim itself ----------------------------------------------------------------------------


def page() -> list[int]:
    words = [0] * page_words(1)
    blank_page(words)
    return words


def shown(words: list[int]) -> tuple[int, int]:
    return words[LANES], words[CLAIMED]


def test_the_page_shows_a_claim_from_its_first_job_to_its_end() -> None:
    words = page()
    claims = Claims(words)

    left = claims.begin(["a", "b", "c"], 10)

    assert shown(words) == (10, 13)
    assert list(left) == ["a", "b", "c"]
    claims.end(12)
    assert shown(words) == (12, IDLE)


def test_what_has_not_begun_is_given_back_at_the_second_look() -> None:
    words = page()
    claims = Claims(words)
    items = list("abcde")
    left = claims.begin(items, 10)
    next(left), next(left)

    claims.narrow()
    assert shown(words) == (10, 15)
    claims.narrow()

    assert shown(words) == (11, 12)
    assert items == ["a", "b"]
    assert list(left) == []


def test_a_claim_of_which_nothing_has_begun_is_left_as_it_is() -> None:
    words = page()
    claims = Claims(words)
    left = claims.begin(["a", "b"], 10)

    for _ in range(3):
        claims.narrow()

    assert shown(words) == (10, 12)
    assert list(left) == ["a", "b"]


def test_each_claim_has_its_own_two_looks() -> None:
    words = page()
    claims = Claims(words)
    next(claims.begin(["a", "b"], 10))
    claims.narrow()
    next(claims.begin(["c", "d"], 12))

    claims.narrow()

    assert shown(words) == (12, 14)


# --- when jobs are claimed -----------------------------------------------------------------------


def test_jobs_are_claimed_after_a_chunk_of_quick_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobq.work.QUICK_SECONDS", 0.5)
    claimed: list[bool] = []

    def work(i: int) -> None:  # noqa: ARG001
        claimed.append(bench.port.page[CLAIMED] != IDLE)

    with Bench(work, ReferenceCodec(), flusher=True) as bench:
        bench.do(1, 2)
        bench.do(3, 4)

    assert claimed == [False, False, True, True]


def test_a_slow_chunk_is_no_quick_one_though_most_of_it_was_answered_before_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobq.work.QUICK_SECONDS", 0.001)
    claimed: list[bool] = []
    sent = threading.Event()

    def work(i: int) -> None:
        claimed.append(bench.port.page[CLAIMED] != IDLE)
        if i == 3:
            assert sent.wait(20)  # the flusher looks after 5 ms at the soonest

    with Bench(work, ReferenceCodec(), flusher=True) as bench:
        bench.port.watch = lambda answer: sent.set() if answer.settled else None
        bench.do(1, 2, 3)
        bench.do(4, 5)

    assert claimed == [False] * 5


def test_a_slow_chunk_is_no_quick_one_though_it_was_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobq.work.QUICK_SECONDS", 0.001)
    claimed: list[bool] = []

    def work(i: int) -> None:  # noqa: ARG001
        claimed.append(bench.port.page[CLAIMED] != IDLE)
        began = time.monotonic()
        while time.monotonic() < began + 0.002:
            pass
        bench.port.page[LIMIT] = bench.sent + 1

    with Bench(work, ReferenceCodec(), flusher=True) as bench:
        bench.do(*range(1000))
        bench.port.page[LIMIT] = NO_LIMIT
        bench.do(1, 2)

    assert claimed == [False, False]


# --- in a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gives", [True, False], ids=["results", "none"])
@pytest.mark.parametrize("backend", [*PROCESSES, "thread"])
def test_each_job_is_done_once(backend: str, gives: bool, notes: Notes) -> None:
    pipeline = ints(3000)

    def work(i: int) -> int:
        if i % 7 == 0:
            notes.add(f"did {i}")
        return i

    def end(i: int) -> None:
        work(i)

    pipeline.consumer(work if gives else end, workers=2)
    report = run(pipeline, backend)

    assert report.ok
    assert Counter(notes.lines()) == Counter(f"did {i}" for i in range(0, 3000, 7))
    assert sorted(report.results) == (list(range(3000)) if gives else [])


@pytest.mark.parametrize("gives", [True, False], ids=["results", "none"])
def test_jobs_that_raise_are_the_only_ones_that_fail(gives: bool) -> None:
    pipeline = ints(1000)

    def work(i: int) -> int:
        if i % 10 == 3:
            raise ValueError(i)
        return i

    def end(i: int) -> None:
        work(i)

    pipeline.consumer(work if gives else end)
    with pytest.raises(JobsFailed) as caught:
        pipeline.run(collect=True)

    report = caught.value.report
    assert [letter.item for letter in report.dead] == list(range(3, 1000, 10))
    assert report.results == ([i for i in range(1000) if i % 10 != 3] if gives else [])


@pytest.mark.parametrize("gives", [True, False], ids=["results", "none"])
@pytest.mark.parametrize("backend", [*PROCESSES, "thread"])
def test_nothing_waits_behind_a_slow_job_while_a_worker_is_free(
    backend: str, gives: bool, notes: Notes
) -> None:
    pipeline = ints(500)

    def work(i: int) -> int:
        if i == 250:
            until(lambda: len(notes.lines()) == 499)  # all others are done
        else:
            notes.add(i)
        return i

    def end(i: int) -> None:
        work(i)

    pipeline.consumer(work if gives else end, workers=2)
    report = run(pipeline, backend)

    assert report.ok
    assert Counter(notes.lines()) == Counter(str(i) for i in range(500) if i != 250)


@pytest.mark.parametrize("deliveries", [1, 2, 3])
@pytest.mark.parametrize("backend", PROCESSES)
def test_a_deadly_job_is_found_and_only_it_is_given_up(backend: str, deliveries: int, notes: Notes) -> None:
    pipeline = ints(300)

    @pipeline.consumer(workers=2, max_deliveries=deliveries)
    def work(i: int) -> int:
        if i == 150:
            notes.add("died")
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return i

    with pytest.raises(JobsFailed) as caught:
        pipeline.run(backend=backend, collect=True)

    report = caught.value.report
    assert sorted(report.results) == [i for i in range(300) if i != 150]
    assert [(letter.item, letter.deliveries) for letter in report.dead] == [(150, deliveries)]
    stage = report.stages["work"]
    assert notes.lines() == ["died"] * deliveries
    assert (stage.worker_restarts, stage.redelivered) == (deliveries, deliveries)


def test_a_worker_killed_again_and_again_loses_nothing(notes: Notes) -> None:
    pipeline = ints(2000)

    @pipeline.consumer(workers=2, max_deliveries=20)
    def work(i: int) -> int:
        if i % 250 == 100 and f"died at {i}" not in notes.lines():
            notes.add(f"died at {i}")
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return i

    report = run(pipeline, "joinable")

    assert report.ok
    assert sorted(report.results) == list(range(2000))
    assert len(notes.lines()) == 8
