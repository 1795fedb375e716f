"""A run that the program feeds: futures, waiting, steering; on every backend."""

# ruff: noqa: ARG001  # jobs take items that they need not look at

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobq import Job, JobqError, JoinTimeout, PayloadError, Pipeline, RunFailed, Skip, WorkerLost
from jobq.errors import BackendUnavailable
from jobq.letters import RemoteTraceback
from jobq.session import JobFuture, Session
from tests.test_deaths import DeadlyToLoad, die, until
from tests.test_run import (
    BACKENDS,
    ONE_OF_EACH,
    PROCESSES,
    Animal,
    Dog,
    Gate,
    Notes,
    Odd,
    Plain,
    Unloadable,
    Unpicklable,
)

#: Where a job can wait for a gate while this thread goes on.
ASIDE = (*PROCESSES, "thread")
#: Seconds after which what should happen counts as never happening.
PATIENCE = 20.0

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ASIDE)
def aside(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=PROCESSES)
def processes(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


def doubling(**options: Any) -> Pipeline:
    """Return a pipeline of one stage, which gives twice what it takes and fails for 13."""
    pipeline = Pipeline("test")

    @pipeline.consumer(**options)
    def double(i: int) -> int:
        if i == 13:
            raise Plain("thirteen")
        return 2 * i

    return pipeline


def gated(gate: Gate, notes: Notes, **options: Any) -> Pipeline:
    """Return a pipeline of one stage, whose jobs note that they have begun and wait at *gate*."""
    pipeline = Pipeline("test")

    @pipeline.consumer(**options)
    def work(i: int) -> int:
        notes.add(i)
        gate.wait()
        return i

    return pipeline


def has_balanced(run: Session) -> bool:
    """Whether the report is there, and its books balance."""
    assert run.report is not None
    return all(
        one.received == one.done + one.filtered + one.dead + one.cancelled
        and (one.queued, one.in_flight, one.workers) == (0, 0, 0)
        for one in run.report.stages.values()
    )


def in_thread(function: Callable[[], Any]) -> threading.Thread:
    """Start *function* in a thread."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def is_waiting(thread: threading.Thread, function: str) -> bool:
    """Whether *thread* waits for a lock in a call of *function*."""
    frame = sys._current_frames().get(thread.ident or 0)
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return bool(names) and names[0] == "wait" and function in names


@pytest.mark.parametrize("backend", ["pipe", "thread"])
@pytest.mark.parametrize("how", ["open", "stream"])
def test_where_no_thread_can_drive_nothing_is_left(
    backend: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(3)

    @pipeline.consumer
    def take(i: int) -> int:
        return i

    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "jobq-driver":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)

    with pytest.raises(BackendUnavailable, match="the thread that drives the run can't be started"):
        if how == "open":
            pipeline.open(backend=backend)
        else:
            next(pipeline.stream(backend=backend))


def test_a_signal_while_a_session_is_made_strikes_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def take(i: int) -> int:
        return i

    def fork() -> int:
        pid = real()
        if pid:
            signal.raise_signal(signal.SIGINT)
        return pid

    real = os.fork
    monkeypatch.setattr(os, "fork", fork)

    with pytest.raises(KeyboardInterrupt):
        pipeline.open()


# --- submit and result ---------------------------------------------------------------------------


def test_each_item_has_its_result(backend: str) -> None:
    with doubling(workers=2).open(backend=backend) as run:
        futures = [run.submit(i) for i in range(13)]

        assert [future.result(PATIENCE) for future in futures] == [2 * i for i in range(13)]
        assert all(future.done() and not future.cancelled() for future in futures)
        assert run.submit(50).exception() is None

    assert has_balanced(run)
    assert run.report is not None
    assert (run.report.ok, run.report.stages["double"].done) == (True, 14)


def test_results_can_be_asked_for_after_the_end_and_again(backend: str) -> None:
    with doubling().open(backend=backend) as run:
        futures = [run.submit(i) for i in range(5)]

    assert [future.result() for future in futures * 2] == [0, 2, 4, 6, 8] * 2


def test_a_producer_does_not_run_but_says_who_takes_what(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def zoo(never_given: int) -> Iterator[Animal | Dog]:
        raise AssertionError

    @pipeline.consumer
    def other(animal: Animal) -> str:
        return f"animal {animal.name}"

    @pipeline.consumer(source="zoo")
    def dogs(dog: Dog) -> str:
        return f"dog {dog.name}"

    with pipeline.open(backend=backend) as run:
        assert run.submit(Dog("rex")).result() == "dog rex"
        with pytest.raises(PayloadError):
            run.submit("rex")

    assert has_balanced(run)


@pytest.mark.parametrize("declared", [True, False], ids=["producer", "none"])
def test_an_item_goes_to_the_first_stage_that_takes_its_type(backend: str, declared: bool) -> None:
    pipeline = Pipeline("test")

    if declared:

        @pipeline.producer
        def source() -> Iterator[int | str]:
            yield 1

    @pipeline.consumer
    def number(i: int) -> bytes:
        return b"number"

    @pipeline.consumer
    def text(s: str) -> bytes:
        return b"text"

    with pipeline.open(backend=backend) as run:
        assert [run.submit(item).result() for item in (1, "a")] == [b"number", b"text"]


@dataclass
class Sized:
    size: int


def test_an_item_that_no_stage_takes_is_refused_at_once(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def work(item: Sized) -> int:
        return item.size

    with pipeline.open(backend=backend) as run:
        with pytest.raises(PayloadError, match=r"no stage takes this str: work\(\) takes Sized"):
            run.submit("text")
        with pytest.raises(PayloadError, match=r"work\(\) takes Sized: field 'size'"):
            run.submit(Sized("large"))  # type: ignore[arg-type]  # the error under test
        assert run.submit(Sized(3)).result() == 3

    assert has_balanced(run)
    assert run.report is not None
    assert run.report.stages["work"].received == 1


def test_a_stage_that_checks_nothing_takes_what_fits_nobody(backend: str) -> None:
    with doubling(validate=False).open(backend=backend) as run:
        assert run.submit("ab").result() == "abab"


def test_an_item_that_cannot_be_pickled_is_refused_at_once(processes: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def work(item: object) -> int:
        return 1

    with pipeline.open(backend=processes) as run:
        with pytest.raises(PayloadError, match=r"work\(\).*not me"):
            run.submit(Unpicklable())
        assert run.submit(1).result() == 1
        run.join(PATIENCE)


def test_an_item_arrives_as_it_was_when_it_was_submitted(processes: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def work(item: list[int]) -> list[int]:
        return item

    with pipeline.open(backend=processes) as run:
        item = [1]
        future = run.submit(item)
        item.append(2)
        assert future.result() == [1]


def test_a_submit_after_the_end_is_an_error(backend: str) -> None:
    with doubling().open(backend=backend) as run:
        pass

    with pytest.raises(JobqError, match="no more items"):
        run.submit(1)
    with pytest.raises(JobqError, match="ended"):
        run.pause()


def test_keys_filter_what_was_submitted_before(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer(key=str)
    def work(i: int) -> int:
        return i

    with pipeline.open(backend=backend) as run:
        futures = [run.submit(i) for i in (1, 2, 1, 1, 3)]
        assert [future.result() for future in futures] == [1, 2, None, None, 3]

    assert run.report is not None
    assert run.report.stages["work"].duplicates == 2


def test_a_key_that_cannot_be_computed_is_the_item_s_failure(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer(key=lambda i: str(1 // i))
    def work(i: int) -> int:
        return i

    with pipeline.open(backend=backend) as run:
        futures = [run.submit(i) for i in (1, 0)]
        assert futures[0].result() == 1
        with pytest.raises(PayloadError, match="ZeroDivisionError"):
            futures[1].result()


# --- what a future holds -------------------------------------------------------------------------


def test_an_error_is_raised_as_itself_with_the_remote_traceback(backend: str) -> None:
    with doubling().open(backend=backend) as run:
        future = run.submit(13)

        with pytest.raises(Plain, match="thirteen") as caught:
            future.result(PATIENCE)
        assert isinstance(future.exception(), Plain)

    assert caught.value.__notes__ == ["stage double, job 0, item 13"]
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in double" in str(caught.value.__cause__)
    assert run.report is not None
    assert (run.report.ok, run.report.stages["double"].dead) == (False, 1)


def test_an_error_that_cannot_be_loaded_is_told_as_text(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def work(i: int) -> int:
        raise Odd(i, 2)

    with pipeline.open(backend=backend) as run, pytest.raises((JobqError, Odd), match="1, 2"):
        run.submit(1).result(PATIENCE)


def test_a_result_that_cannot_be_loaded_is_an_error(processes: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def work(i: int) -> object:
        return Unloadable()

    with pipeline.open(backend=processes) as run:
        future = run.submit(1)
        with pytest.raises(PayloadError, match="could not be loaded"):
            future.result(PATIENCE)
        assert isinstance(future.exception(), PayloadError)


def test_the_future_is_done_with_the_last_of_two_takers(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def source() -> Iterator[int]:
        yield 1

    @pipeline.consumer(source="source")
    def first(i: int) -> str:
        return f"first {i}"

    @pipeline.consumer(source="source")
    def second(i: int) -> str:
        return f"second {i}"

    with pipeline.open(backend=backend) as run:
        results = [run.submit(i).result(PATIENCE) for i in range(20)]

    assert all(result in (f"first {i}", f"second {i}") for i, result in enumerate(results))
    assert run.report is not None
    assert [run.report.stages[name].done for name in ("first", "second")] == [20, 20]


def test_the_result_that_settled_last_is_held(aside: str, gate: Gate) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def source() -> Iterator[int]:
        yield 1

    @pipeline.consumer(source="source")
    def late(i: int) -> str:
        gate.wait()
        return "late"

    @pipeline.consumer(source="source")
    def early(i: int) -> str:
        return "early"

    with pipeline.open(backend=aside) as run:
        future = run.submit(1)
        until(lambda: run.stats()["early"].done == 1)
        assert not future.done()
        gate.open()
        assert future.result(PATIENCE) == "late"


def test_a_generator_s_last_descendant_counts(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def split(n: int) -> Iterator[str]:
        yield from map(str, range(n))

    @pipeline.consumer
    def mark(text: str) -> bytes:
        return text.encode()

    with pipeline.open(backend=backend) as run:
        futures = [run.submit(n) for n in (3, 0, 2500)]
        assert [future.result(PATIENCE) for future in futures] == [b"2", None, b"2499"]

    assert has_balanced(run)
    assert run.report is not None
    assert run.report.stages["mark"].done == 2503


def test_a_filtered_job_has_no_result(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def even(i: int) -> int | None:
        if i == 5:
            raise Skip("five")
        return i if i % 2 == 0 else None

    with pipeline.open(backend=backend) as run:
        assert [run.submit(i).result(PATIENCE) for i in (2, 3, 5)] == [2, None, None]


def test_an_end_stage_gives_no_result(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def end(i: int) -> None: ...

    with pipeline.open(backend=backend) as run:
        assert run.submit(1).result(PATIENCE) is None


def test_a_dead_descendant_is_the_future_s_exception(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def split(n: int) -> Iterator[str]:
        yield from map(str, range(n))

    @pipeline.consumer
    def check(text: str) -> str:
        if text in ("2", "4"):
            raise Plain(text)
        return text

    with pipeline.open(backend=backend) as run:
        futures = [run.submit(n) for n in (2, 6)]
        assert futures[0].result(PATIENCE) == "1"
        with pytest.raises(Plain, match="2"):
            futures[1].result(PATIENCE)

    assert run.report is not None
    assert run.report.stages["check"].dead == 2


def test_a_retried_job_s_future_waits_for_its_last_attempt(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer(max_retries=2, min_backoff=0.001)
    def work(i: int, job: Job) -> int:
        if job.attempt < 3 or i == 2:
            raise Plain(str(job.attempt))
        return job.attempt

    with pipeline.open(backend=backend) as run:
        futures = [run.submit(i) for i in (1, 2)]
        assert futures[0].result(PATIENCE) == 3
        with pytest.raises(Plain, match="3"):
            futures[1].result(PATIENCE)


def test_ordered_stages_settle_in_order(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer(workers=2, ordered=True, max_retries=1, min_backoff=0.001)
    def first(i: int, job: Job) -> str:
        if i % 7 == 3 and job.attempt == 1:
            raise Plain("again")
        if i % 11 == 5:
            raise Skip("eleven")
        return str(i)

    @pipeline.consumer
    def second(text: str) -> str:
        return text

    with pipeline.open(backend=backend) as run:
        futures = [run.submit(i) for i in range(100)]
        results = [future.result(PATIENCE) for future in futures]

    assert results == [None if i % 11 == 5 else str(i) for i in range(100)]
    assert has_balanced(run)


def test_a_loop_settles_with_its_last_turn(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def seeds() -> Iterator[int]:
        yield 1

    @pipeline.consumer(source=["seeds", "count"])
    def count(i: int) -> Iterator[int | str]:
        if i:
            yield from (i - 1, f"at {i}")

    with pipeline.open(backend=backend) as run:
        futures = [run.submit(n) for n in (5, 0, 3)]
        assert [future.result(PATIENCE) for future in futures] == ["at 1", None, "at 1"]

    assert has_balanced(run)


# --- batches -------------------------------------------------------------------------------------


def batching(size: int, timeout: float) -> Pipeline:
    """Return a pipeline of one stage that gives the length of each batch, and dies of 13."""
    pipeline = Pipeline("test")

    @pipeline.consumer(batch=size, batch_timeout=timeout)
    def total(numbers: list[int]) -> int:
        if 13 in numbers:
            raise Plain("thirteen")
        return len(numbers)

    return pipeline


def test_a_batch_leaves_when_it_is_full_and_its_result_is_all_its_items(backend: str) -> None:
    with batching(4, 1000).open(backend=backend) as run:
        futures = [run.submit(i) for i in range(8)]
        run.join(PATIENCE)
        assert [future.result() for future in futures] == [4] * 8


def test_a_batch_that_nobody_fills_leaves_after_its_time(backend: str) -> None:
    with batching(4, 0.05).open(backend=backend) as run:
        future = run.submit(1)

        assert future.result(PATIENCE) == 1


def test_the_last_batch_leaves_at_the_end_at_once(backend: str) -> None:
    with batching(100, 1000).open(backend=backend) as run:
        futures = [run.submit(i) for i in range(3)]

    assert [future.result() for future in futures] == [3] * 3


def test_every_item_of_a_dead_batch_has_its_exception(backend: str) -> None:
    with batching(3, 1000).open(backend=backend) as run:
        futures = [run.submit(i) for i in (12, 13, 14)]
        assert [type(future.exception(PATIENCE)) for future in futures] == [Plain] * 3


# --- waiting -------------------------------------------------------------------------------------


def test_wait_and_as_completed_work(backend: str) -> None:
    with doubling(workers=2).open(backend=backend) as run:
        futures: dict[Any, int] = {run.submit(i): i for i in range(30)}

        for future in concurrent.futures.as_completed(futures, PATIENCE):
            i = futures[future]
            assert (i == 13) == (future.exception() is not None)
        again = [run.submit(i) for i in range(5)]
        done, rest = concurrent.futures.wait(again, PATIENCE)
        assert (len(done), len(rest)) == (5, 0)
        more = [run.submit(i) for i in (1, 13)]
        done, _ = concurrent.futures.wait(more, PATIENCE, concurrent.futures.FIRST_COMPLETED)
        assert done
        done, _ = concurrent.futures.wait(more, PATIENCE, concurrent.futures.FIRST_EXCEPTION)
        assert more[1] in done


def test_waiting_for_several_futures_sees_a_cancelled_one(backend: str) -> None:
    with doubling().open(backend=backend) as run:
        run.pause()
        futures = [run.submit(i) for i in range(3)]
        assert futures[1].cancel()
        run.resume()

        done, rest = concurrent.futures.wait(futures, PATIENCE)

    assert (len(done), len(rest)) == (3, 0)
    assert [future.cancelled() for future in futures] == [False, True, False]


def test_waiting_has_a_limit(backend: str) -> None:
    with doubling().open(backend=backend) as run:
        run.pause()
        future = run.submit(1)

        with pytest.raises(TimeoutError):
            future.result(0.02)
        with pytest.raises(TimeoutError):
            future.exception(0.02)
        done, rest = concurrent.futures.wait([future], 0.02)
        assert (len(done), len(rest)) == (0, 1)
        with pytest.raises(JoinTimeout, match="1 item is not settled after"):
            run.join(0.02)
        run.resume()
        assert future.result(PATIENCE) == 2


def test_a_future_s_repr_says_how_it_stands(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def invert(i: int) -> float:
        return 1 / i

    with pipeline.open(backend=backend) as session:
        session.pause()
        futures = [session.submit(i) for i in (2, 0, 4)]
        pending = repr(futures[0])
        futures[2].cancel()
        session.resume()
        session.join()

    assert pending == "<JobFuture pending>"
    assert list(map(repr, futures)) == ["<JobFuture done>", "<JobFuture failed>", "<JobFuture cancelled>"]


def test_polling_a_future_comes_to_an_end(backend: str) -> None:
    with doubling().open(backend=backend) as run:
        future = run.submit(1)

        until(future.done)
        assert future.result(0) == 2


def test_a_future_can_be_awaited(backend: str) -> None:
    pipeline = doubling(workers=2)

    async def main() -> list[Any]:
        with pipeline.open(backend=backend) as run:
            futures = [asyncio.wrap_future(run.submit(i)) for i in range(20)]
            results = await asyncio.wait_for(
                asyncio.gather(*futures, return_exceptions=True), timeout=PATIENCE
            )
            return list(results)

    results = asyncio.run(main())

    assert isinstance(results.pop(13), Plain)
    assert results == [2 * i for i in range(20) if i != 13]


def test_a_result_that_cannot_be_loaded_ends_an_await_too(processes: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def work(i: int) -> object:
        return Unloadable()

    async def main() -> None:
        with pipeline.open(backend=processes) as run:
            await asyncio.wait_for(asyncio.wrap_future(run.submit(1)), PATIENCE)

    with pytest.raises(PayloadError, match="could not be loaded"):
        asyncio.run(main())


def test_cancelling_a_task_cancels_what_it_awaits(backend: str) -> None:
    pipeline = doubling()

    async def main() -> bool:
        with pipeline.open(backend=backend) as run:
            run.pause()
            future = run.submit(1)
            task = asyncio.ensure_future(asyncio.wrap_future(future))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await asyncio.sleep(0)
            run.resume()
            return future.cancelled()

    assert asyncio.run(main())


def test_join_waits_for_what_was_submitted(backend: str) -> None:
    with doubling(workers=2).open(backend=backend) as run:
        futures = [run.submit(i) for i in range(100)]
        run.join(PATIENCE)

        stats = run.stats()["double"]
        assert (stats.done, stats.dead, stats.queued, stats.in_flight) == (99, 1, 0, 0)
        assert all(future.done() for future in futures)
        run.join(0)


def test_join_does_not_wait_for_what_comes_later(
    aside: str, gate: Gate, notes: Notes, tmp_path: Path
) -> None:
    first_gate = Gate(tmp_path / "first")
    pipeline = Pipeline("test")

    @pipeline.consumer(workers=2)
    def work(i: int) -> int:
        notes.add(i)
        (gate if i else first_gate).wait()
        return i

    with pipeline.open(backend=aside) as run:
        first = run.submit(0)
        joining = in_thread(run.join)
        until(lambda: notes.lines() == ["0"] and is_waiting(joining, "join"))
        later = run.submit(1)
        until(lambda: notes.lines() == ["0", "1"])
        first_gate.open()
        joining.join(PATIENCE)

        assert not joining.is_alive()
        assert (first.done(), later.done()) == (True, False)
        gate.open()
    first_gate.close()


# --- callbacks -----------------------------------------------------------------------------------


def test_callbacks_are_called_in_this_process(backend: str) -> None:
    called: list[tuple[int, Any]] = []

    def note(future: Any) -> None:
        called.append((os.getpid(), future.result()))

    with doubling().open(backend=backend) as run:
        future = run.submit(1)
        future.add_done_callback(note)
        future.result()

    assert called == [(os.getpid(), 2)]


def test_a_callback_on_a_future_that_is_done_is_called_at_once(backend: str) -> None:
    called: list[Any] = []
    with doubling().open(backend=backend) as run:
        future = run.submit(1)
        future.result()
        future.add_done_callback(called.append)
        assert called == [future]


def test_a_callback_may_submit_and_the_end_waits_for_that(backend: str) -> None:
    results: list[int] = []

    def again(future: Any) -> None:
        results.append(future.result())
        if future.result() < 100:
            run.submit(future.result()).add_done_callback(again)

    with doubling().open(backend=backend) as run:
        run.submit(1).add_done_callback(again)

    assert results == [2, 4, 8, 16, 32, 64, 128]
    assert has_balanced(run)


def test_a_callback_may_wait_for_another_result(backend: str) -> None:
    results: list[int] = []

    with doubling().open(backend=backend) as run:
        run.submit(1).add_done_callback(lambda _: results.append(run.submit(9).result(PATIENCE)))
        assert run.submit(2).result(PATIENCE) == 4

    assert results == [18]


def test_a_callback_that_submits_waits_when_the_queue_is_full(backend: str) -> None:
    results: list[int] = []

    def more(future: Any) -> None:
        for i in range(10):
            run.submit(i).add_done_callback(lambda future: results.append(future.result()))

    with doubling(queue_size=1).open(backend=backend) as run:
        run.submit(1).add_done_callback(more)

    assert sorted(results) == [2 * i for i in range(10)]


def test_a_callback_that_raises_harms_nobody(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    called: list[int] = []

    def raises(future: Any) -> None:
        raise Plain("in a callback")

    with doubling().open(backend=backend) as run:
        futures = [run.submit(i) for i in range(3)]
        futures[0].add_done_callback(raises)
        for future in futures:
            future.add_done_callback(lambda future: called.append(future.result()))

    assert sorted(called) == [0, 2, 4]
    assert "in a callback" in caplog.text


def test_a_callback_may_stop_the_run(backend: str) -> None:
    with doubling().open(backend=backend) as run:
        run.submit(1).add_done_callback(lambda _: run.stop())
        run.join(PATIENCE)

    assert has_balanced(run)


# --- cancel --------------------------------------------------------------------------------------


def test_a_job_that_has_not_begun_can_be_cancelled(aside: str, gate: Gate, notes: Notes) -> None:
    with gated(gate, notes).open(backend=aside) as run:
        futures = [run.submit(i) for i in range(5)]
        until(lambda: notes.lines() == ["0"])
        called: list[Any] = []
        futures[2].add_done_callback(called.append)

        assert futures[2].cancel()
        assert futures[2].cancel()
        assert not futures[0].cancel()  # it has begun
        gate.open()
        run.join(PATIENCE)

        assert [future.cancelled() for future in futures] == [False, False, True, False, False]
        with pytest.raises(CancelledError):
            futures[2].result()
        with pytest.raises(CancelledError):
            futures[2].exception()
        assert [futures[i].result() for i in (0, 1, 3, 4)] == [0, 1, 3, 4]
        assert not futures[0].cancel()

    assert called == [futures[2]]
    assert notes.lines() == ["0", "1", "3", "4"]
    assert has_balanced(run)
    assert run.report is not None
    assert (run.report.stages["work"].done, run.report.stages["work"].cancelled) == (4, 1)


def test_inline_jobs_can_be_cancelled_until_somebody_waits(notes: Notes) -> None:
    with doubling().open(backend="inline") as run:
        futures = [run.submit(i) for i in range(3)]

        assert futures[1].cancel()
        assert [futures[i].result() for i in (0, 2)] == [0, 4]

    assert has_balanced(run)


def test_a_job_that_has_been_through_a_stage_cannot_be_cancelled(
    aside: str, gate: Gate, notes: Notes
) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def first(i: int) -> str:
        return str(i)

    @pipeline.consumer
    def second(text: str) -> str:
        notes.add(text)
        gate.wait()
        return text

    with pipeline.open(backend=aside) as run:
        futures = [run.submit(i) for i in range(3)]
        until(lambda: run.stats()["first"].done == 3 and notes.lines() == ["0"])

        assert not futures[2].cancel()
        gate.open()
        assert [future.result(PATIENCE) for future in futures] == ["0", "1", "2"]


def test_an_item_of_two_takers_is_cancelled_at_both_or_not_at_all(
    aside: str, gate: Gate, notes: Notes
) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def source() -> Iterator[int]:
        yield 1

    @pipeline.consumer(source="source")
    def slow(i: int) -> str:
        notes.add(f"slow {i}")
        gate.wait()
        return "slow"

    @pipeline.consumer(source="source", queue_size=100)
    def quick(i: int) -> str:
        if i == 2:
            notes.add("quick 2")
            gate.wait()
        return "quick"

    with pipeline.open(backend=aside) as run:
        futures = [run.submit(i) for i in range(5)]
        until(lambda: set(notes.lines()) == {"slow 0", "quick 2"})

        assert not futures[1].cancel()  # quick is done with it
        assert not futures[2].cancel()  # quick has it in hand
        assert futures[4].cancel()
        gate.open()
        run.join(PATIENCE)

    assert [future.cancelled() for future in futures] == [False, False, False, False, True]
    assert run.report is not None
    assert [run.report.stages[name].done for name in ("slow", "quick")] == [4, 4]
    assert [run.report.stages[name].cancelled for name in ("slow", "quick")] == [1, 1]


# --- a full queue --------------------------------------------------------------------------------


def test_submit_waits_while_the_queue_is_full(aside: str, gate: Gate, notes: Notes) -> None:
    with gated(gate, notes, queue_size=2).open(backend=aside) as run:
        futures: list[JobFuture] = []
        thread = in_thread(lambda: futures.extend(run.submit(i) for i in range(10)))
        until(lambda: notes.lines() == ["0"] and run.stats()["work"].queued == 2)

        assert run.stats()["work"].received == 3
        assert thread.is_alive()
        gate.open()
        thread.join(PATIENCE)
        assert [future.result(PATIENCE) for future in futures] == list(range(10))


def test_submit_waits_while_the_queue_has_too_many_bytes(aside: str, gate: Gate) -> None:
    if aside == "thread":
        pytest.skip("nobody knows how large objects are that travel by reference")
    pipeline = Pipeline("test")

    @pipeline.consumer(queue_bytes=100_000)
    def work(data: bytes) -> int:
        gate.wait()
        return len(data)

    with pipeline.open(backend=aside) as run:
        futures: list[JobFuture] = []
        thread = in_thread(lambda: futures.extend(run.submit(bytes(30_000)) for _ in range(20)))
        until(lambda: run.stats()["work"].received >= 3)

        assert run.stats()["work"].received <= 5
        gate.open()
        thread.join(PATIENCE)
        assert [future.result(PATIENCE) for future in futures] == [30_000] * 20


def test_stats_are_exact_at_a_full_queue_of_ten(aside: str, gate: Gate, notes: Notes) -> None:
    with gated(gate, notes, queue_size=10).open(backend=aside) as run:
        first = run.submit(0)
        until(lambda: notes.lines() == ["0"])
        for i in range(1, 11):
            run.submit(i)
            stats = run.stats()["work"]
            assert (stats.received, stats.queued, stats.in_flight, stats.workers) == (i + 1, i, 1, 1)
        eleventh = in_thread(lambda: run.submit(11))
        assert run.stats()["work"].queued == 10
        assert not first.done()
        gate.open()
        eleventh.join(PATIENCE)
        run.join(PATIENCE)
        stats = run.stats()["work"]
        assert (stats.done, stats.queued, stats.in_flight, stats.workers) == (12, 0, 0, 1)

    assert run.stats()["work"].done == 12


def test_inline_submits_work_themselves_when_the_queue_is_full() -> None:
    with doubling(queue_size=2).open(backend="inline") as run:
        futures = [run.submit(i) for i in range(10)]

        assert [future.result() for future in futures] == [2 * i for i in range(10)]


# --- pause, resume, stop -------------------------------------------------------------------------


def test_while_a_run_is_paused_jobs_in_hand_finish_and_none_begins(
    aside: str, gate: Gate, notes: Notes
) -> None:
    with gated(gate, notes, workers=2).open(backend=aside) as run:
        futures = [run.submit(i) for i in range(50)]
        until(lambda: len(notes.lines()) == 2)

        run.pause()
        gate.open()
        until(lambda: run.stats()["work"].done == 2)
        stats = run.stats()["work"]
        assert (stats.queued, stats.in_flight) == (48, 0)
        assert len(notes.lines()) == 2
        run.resume()
        assert [future.result(PATIENCE) for future in futures] == list(range(50))

    assert len(notes.lines()) == 50


def test_the_end_of_the_with_resumes_a_paused_run(backend: str) -> None:
    with doubling().open(backend=backend) as run:
        run.pause()
        future = run.submit(1)

    assert future.result() == 2


def test_close_resumes_a_paused_run(backend: str) -> None:
    run = doubling().open(backend=backend)
    run.pause()
    future = run.submit(1)

    run.close()
    run.close()

    assert future.result() == 2


def test_stop_cancels_what_is_in_progress(aside: str, gate: Gate, notes: Notes) -> None:
    run = gated(gate, notes).open(backend=aside)
    futures = [run.submit(i) for i in range(5)]
    until(lambda: notes.lines() == ["0"])

    run.stop()
    run.stop()

    assert all(future.cancelled() for future in futures)
    assert has_balanced(run)
    assert run.report is not None
    assert (run.report.ok, run.report.stages["work"].cancelled) == (False, 5)
    gate.open()  # a thread can't be killed


def test_an_exception_in_the_with_block_stops_the_run(aside: str, gate: Gate, notes: Notes) -> None:
    with pytest.raises(Plain, match="in the block"), gated(gate, notes).open(backend=aside) as run:
        futures = [run.submit(i) for i in range(5)]
        until(lambda: notes.lines() == ["0"])
        raise Plain("in the block")

    assert all(future.cancelled() for future in futures)
    assert has_balanced(run)
    gate.open()


def test_inline_runs_are_stopped_too() -> None:
    with pytest.raises(Plain), doubling().open(backend="inline") as run:
        future = run.submit(1)
        raise Plain

    assert future.cancelled()
    assert has_balanced(run)


def test_a_stop_ends_a_submit_that_waits_and_whoever_joins(aside: str, gate: Gate, notes: Notes) -> None:
    run = gated(gate, notes, queue_size=1).open(backend=aside)
    errors: list[BaseException] = []

    def feed() -> None:
        try:
            for i in range(10):
                run.submit(i)
        except JobqError as error:
            errors.append(error)

    feeding = in_thread(feed)
    until(lambda: notes.lines() == ["0"] and run.stats()["work"].queued == 1)
    joining = in_thread(run.join)

    run.stop()

    feeding.join(PATIENCE)
    joining.join(PATIENCE)
    assert not feeding.is_alive()
    assert not joining.is_alive()
    assert "no more items" in str(errors[0])
    gate.open()


def test_a_run_may_be_stopped_while_another_thread_closes_it(aside: str, gate: Gate, notes: Notes) -> None:
    run = gated(gate, notes).open(backend=aside)
    future = run.submit(1)
    until(lambda: notes.lines() == ["1"])
    closing = in_thread(run.close)

    run.stop()

    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert future.cancelled()
    assert has_balanced(run)
    gate.open()


def test_dead_letters_up_to_the_limit_end_the_run(backend: str) -> None:
    with doubling().open(backend=backend, max_failures=1) as run:
        assert isinstance(run.submit(13).exception(PATIENCE), Plain)
        with pytest.raises((JobqError, CancelledError)):
            for i in range(100_000):
                run.submit(i).result(PATIENCE)

    assert has_balanced(run)


def test_a_job_on_inline_cannot_wait_for_its_own_run() -> None:
    pipeline = Pipeline("test")
    runs: list[Session] = []

    @pipeline.consumer
    def work(i: int) -> int:
        return int(runs[0].submit(i + 1).result()) if i == 0 else i

    with pipeline.open(backend="inline") as run:
        runs.append(run)
        with pytest.raises(JobqError, match="can't wait for its own run"):
            run.submit(0).result()


# --- threads -------------------------------------------------------------------------------------


def test_several_threads_submit_while_another_joins(backend: str) -> None:
    results: list[list[int]] = [[] for _ in range(4)]

    with doubling(workers=2, queue_size=50).open(backend=backend) as run:

        def feed(place: int) -> None:
            futures = [run.submit(i) for i in range(place * 1000, place * 1000 + 50) if i != 13]
            results[place] = [future.result(PATIENCE) for future in futures]

        threads = [in_thread(lambda place=place: feed(place)) for place in range(4)]  # type: ignore[misc]
        while any(thread.is_alive() for thread in threads):
            run.join(PATIENCE)
            run.stats()
        for thread in threads:
            thread.join()

    for place, got in enumerate(results):
        assert got == [2 * i for i in range(place * 1000, place * 1000 + 50) if i != 13]
    assert has_balanced(run)


def test_a_session_lives_in_a_thread_that_is_not_the_main_one(backend: str) -> None:
    results: list[int] = []

    def live() -> None:
        with doubling().open(backend=backend, start_method="fork") as run:
            results.extend(run.map(range(5)))

    in_thread(live).join(PATIENCE)

    assert results == [0, 2, 4, 6, 8]


def test_two_sessions_at_once_do_not_mix(backend: str) -> None:
    given = {"backend": backend, "start_method": "fork"}
    with doubling().open(**given) as one, doubling().open(**given) as two:
        pairs = [(one.submit(i), two.submit(100 + i)) for i in range(10)]
        futures = [future for pair in pairs for future in pair]
        done, rest = concurrent.futures.wait(futures, PATIENCE)
        assert (len(done), len(rest)) == (20, 0)
        assert [(a.result(), b.result()) for a, b in pairs] == [(2 * i, 200 + 2 * i) for i in range(10)]

    assert has_balanced(one)
    assert has_balanced(two)


def test_a_session_works_beside_other_threads(backend: str) -> None:
    over = threading.Event()
    busy = in_thread(lambda: over.wait(PATIENCE))

    with doubling().open(backend=backend, start_method="fork") as run:
        assert run.submit(1).result(PATIENCE) == 2
    over.set()
    busy.join()


# --- deaths --------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_costs_nobody_a_result(processes: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer(workers=2)
    def work(i: int, job: Job) -> int:
        if i == 20 and job.delivery == 1:
            die()
        return i

    with pipeline.open(backend=processes) as run:
        futures = [run.submit(i) for i in range(50)]
        assert [future.result(PATIENCE) for future in futures] == list(range(50))
        assert run.stats()["work"].worker_restarts == 1


def test_a_worker_that_is_killed_while_idle_is_replaced(processes: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def pid(i: int) -> int:
        return os.getpid()

    with pipeline.open(backend=processes) as run:
        first = run.submit(1).result(PATIENCE)
        os.kill(first, signal.SIGKILL)
        assert run.submit(2).result(PATIENCE) != first


@pytest.mark.parametrize("how", ["job", "item"])
def test_a_job_that_kills_its_workers_is_an_error(processes: str, how: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer(max_deliveries=2)
    def work(item: object) -> int:
        if item == "die":
            die()
        return 1

    with pipeline.open(backend=processes) as run:
        futures = [run.submit(item) for item in (1, "die" if how == "job" else DeadlyToLoad(), 2)]
        with pytest.raises(WorkerLost, match="2 times"):
            futures[1].result(PATIENCE)
        assert [futures[i].result(PATIENCE) for i in (0, 2)] == [1, 1]

    assert has_balanced(run)


def test_a_run_that_gives_up_says_why(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.resource
    def database() -> object:
        raise Plain("no database")

    @pipeline.consumer
    def work(i: int, database: object) -> int:
        return i

    with pytest.raises((RunFailed, Plain), match="no database"), pipeline.open(backend=backend) as run:
        with pytest.raises((RunFailed, Plain), match="no database"):
            run.submit(1).result(PATIENCE)
        run.close()


# --- Ctrl-C --------------------------------------------------------------------------------------

INTERRUPTED = """
import os, sys, time
from jobq import Job, Pipeline
p = Pipeline("t")

@p.consumer
def work(i: int, job: Job) -> int:
    os.write(1, b"begun\\n")
    while not job.stopping:
        time.sleep(0.01)
    os.write(1, b"told\\n")
    if sys.argv[3] == "deaf":
        time.sleep(50)
    return i

try:
    with p.open(backend=sys.argv[1]) as run:
        future = run.submit(1)
        if sys.argv[2] == "result":
            future.result()
        elif sys.argv[2] == "join":
            run.join()
except KeyboardInterrupt:
    stage = run.report.stages["work"]
    print("interrupted", stage.cancelled, stage.done, stage.dead, future.cancelled())
"""


def interrupt(backend: str, where: str, job: str, folder: Path, *numbers: signal.Signals) -> bytes:
    """Send *numbers*, each when the one before was heard, to a program that waits; return what it says."""
    script = folder / "interrupted.py"
    script.write_text(INTERRUPTED)
    command = [sys.executable, str(script), backend, where, job]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"begun\n"
        for heard, number in enumerate(numbers):
            assert not heard or program.stdout.readline() == b"told\n"
            program.send_signal(number)
        out, errors = program.communicate(timeout=PATIENCE)
    assert (errors, program.returncode) == (b"", 0)
    return out


@pytest.mark.parametrize("where", ["join", "end"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_while_the_program_waits_for_the_run_lets_its_jobs_finish(
    aside: str, where: str, number: signal.Signals, tmp_path: Path
) -> None:
    out = interrupt(aside, where, "heeds", tmp_path, number)

    assert out == b"told\ninterrupted 0 1 0 False\n"


@pytest.mark.parametrize("where", ["join", "end"])
def test_the_second_stops_them(aside: str, where: str, tmp_path: Path) -> None:
    out = interrupt(aside, where, "deaf", tmp_path, signal.SIGINT, signal.SIGINT)

    assert out == b"interrupted 1 0 0 True\n"


def test_ctrl_c_while_the_program_waits_for_a_result_is_the_program_s_own(
    backend: str, tmp_path: Path
) -> None:
    out = interrupt(backend, "result", "deaf", tmp_path, signal.SIGINT)

    assert out.splitlines()[-1] == b"interrupted 1 0 0 True"


@pytest.mark.parametrize("where", ["join", "end"])
def test_where_jobs_run_in_the_program_s_thread_ctrl_c_strikes_at_once(where: str, tmp_path: Path) -> None:
    assert interrupt("inline", where, "deaf", tmp_path, signal.SIGINT) == b"interrupted 1 0 0 True\n"


def strike_beside_the_main_thread() -> None:
    """Have a signal end no wait, like one that comes just before it."""
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)


@pytest.mark.parametrize("where", ["join", "end"])
def test_a_signal_that_comes_just_before_the_wait_is_heeded(where: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def work(i: int, job: Job) -> int:
        until(lambda: signal.getsignal(signal.SIGINT) is not signal.default_int_handler)
        strike_beside_the_main_thread()
        until(lambda: job.stopping)
        return i

    with pytest.raises(KeyboardInterrupt), pipeline.open(backend="thread") as run:
        future = run.submit(1)
        if where == "join":
            run.join()

    assert future.result() == 1


@pytest.mark.parametrize("size", [1, 1000])
def test_many_threads_submit_and_wait(backend: str, size: int) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer(queue_size=size)
    def work(i: int) -> int:
        return 2 * i

    with pipeline.open(backend=backend) as run, concurrent.futures.ThreadPoolExecutor(8) as threads:
        doubled = list(threads.map(lambda i: run.submit(i).result(PATIENCE), range(200)))

    assert doubled == [2 * i for i in range(200)]


def batches(fails: str = "") -> Pipeline:
    pipeline = Pipeline("test")

    @pipeline.consumer(batch=3, batch_timeout=0.05)
    def doubled(numbers: list[int]) -> Iterator[str]:
        for number in numbers:
            yield str(2 * number)

    @pipeline.consumer
    def check(text: str) -> str:
        if text == fails:
            raise Plain(text)
        return text

    return pipeline


def test_what_comes_of_a_batch_descends_from_all_its_items(backend: str) -> None:
    with batches().open(backend=backend) as run:
        futures = [run.submit(number) for number in range(3)]

        results = [future.result(PATIENCE) for future in futures]

    assert len(set(results)) == 1
    assert results[0] in {"0", "2", "4"}
    assert has_balanced(run)


def test_a_dead_descendant_of_a_batch_is_every_item_s(backend: str) -> None:
    with batches(fails="0").open(backend=backend) as run:
        futures = [run.submit(number) for number in range(3)]

        for future in futures:
            with pytest.raises(Plain):
                future.result(PATIENCE)


# --- map -----------------------------------------------------------------------------------------


def test_map_gives_results_in_order(backend: str) -> None:
    with doubling(workers=2).open(backend=backend) as run:
        assert list(run.map(i for i in range(3000) if i != 13)) == [2 * i for i in range(3000) if i != 13]

    assert has_balanced(run)


def test_what_the_source_of_a_map_raises_comes_after_what_it_gave(backend: str) -> None:
    def source() -> Iterator[int]:
        yield 100
        yield 101
        raise Plain("source")

    seen: list[int] = []
    with doubling().open(backend=backend) as run, pytest.raises(Plain):
        seen.extend(run.map(source()))

    assert seen == [200, 202]


def test_map_raises_at_the_turn_of_the_item_that_failed(backend: str) -> None:
    with doubling().open(backend=backend) as run:
        results = run.map(range(100))
        assert [next(results) for _ in range(13)] == [2 * i for i in range(13)]
        with pytest.raises(Plain):
            next(results)
        assert run.submit(1).result(PATIENCE) == 2


def test_map_reads_an_endless_input_within_bounds(backend: str) -> None:
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield 100 + read

    with doubling(queue_size=10).open(backend=backend) as run:
        results = run.map(endless())
        assert read == 0
        assert next(results) == 202
        assert 1 <= read <= 1000
        for i in range(2, 50):
            assert next(results) == 200 + 2 * i
        assert read <= 1050
        results.close()
        run.join(PATIENCE)

    assert has_balanced(run)


def test_map_gives_what_is_there_before_it_waits_for_more(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobq.session.READ_SECONDS", 0.0)  # an input of any speed counts as slow
    given: list[int] = []

    def are_there(results: int) -> bool:
        return run.stats()["double"].done == results

    def slow() -> Iterator[int]:
        for i in range(5):
            until(partial(are_there, i))
            assert len(given) >= i - 1  # the last was asked for before it was there
            yield i

    with doubling().open(backend=backend) as run:
        for result in run.map(slow()):
            given.append(result)  # noqa: PERF402  # the input looks at it meanwhile

    assert given == [0, 2, 4, 6, 8]


def test_no_backend_was_forgotten() -> None:
    assert set(ONE_OF_EACH) <= set(BACKENDS) == {*ASIDE, "inline"}


@pytest.mark.parametrize("backend", ["joinable", "sentinel", "pipe"])
def test_what_was_read_to_its_end_is_not_looked_at_again(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline("echo")
    pipeline.consumer(abs_of)
    read, in_vain = os.read, []

    def watched(fd: int, size: int) -> bytes:
        try:
            return read(fd, size)
        except BlockingIOError:
            in_vain.append(fd)
            raise

    with pipeline.open(backend=backend) as run:
        assert run.submit(0).result() == 0  # all have said hello
        monkeypatch.setattr(os, "read", watched)
        results = [run.submit(-number).result() for number in range(20)]
        monkeypatch.undo()

    assert results == list(range(20))
    assert not in_vain


def abs_of(number: int) -> int:
    return abs(number)
