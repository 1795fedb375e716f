"""A pipeline from end to end, on every backend: the same functions, the same report."""

# ruff: noqa: ARG001  # jobs take items, resources and jobs that they need not look at

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Protocol

import pytest
from pydantic import BaseModel

from jobq import (
    Job,
    JobqError,
    JobsFailed,
    PayloadError,
    Pipeline,
    PipelineError,
    Reject,
    Report,
    Retry,
    RunFailed,
    Shard,
    Skip,
)

PROCESSES = ("joinable", "sentinel", "pipe")
BACKENDS = (*PROCESSES, "thread", "inline")
#: Where one process backend stands for all: what is tested happens in the worker.
ONE_OF_EACH = ("pipe", "thread", "inline")

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Notes:
    """Lines that jobs append to a file: evidence from outside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def add(self, line: object) -> int:
        """Append *line*; return how many bytes the file has then."""
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, f"{line}\n".encode())
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()


class Gate:
    """Holds whoever waits until it is opened; works between processes and threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: list[int] = []
        os.mkfifo(path)

    def wait(self) -> None:
        """Return when it is open."""
        os.close(os.open(self.path, os.O_RDONLY))

    def open(self) -> None:
        """Let everybody pass, until this process ends or closes it."""
        self._opened.append(os.open(self.path, os.O_RDWR | os.O_CLOEXEC))

    def close(self) -> None:
        """Give back what this process needed to open it."""
        while self._opened:
            os.close(self._opened.pop())


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def run(pipeline: Pipeline, backend: str, **given: Any) -> Report:
    """Run, collect, check the books."""
    report = pipeline.run(**{"backend": backend, "collect": True, "check": False, **given})
    for name, stage in report.stages.items():
        settled = stage.done + stage.filtered + stage.dead + stage.cancelled
        assert stage.received == settled, f"{name} doesn't balance"
        assert (stage.queued, stage.in_flight, stage.workers) == (0, 0, 0)
    for edge in report.edges:
        assert edge.emitted == edge.received
    assert report.ok == all(stage.dead == stage.cancelled == 0 for stage in report.stages.values())
    return report


def counts(report: Report, stage: str) -> tuple[int, int, int, int]:
    """Return received, done, filtered and dead."""
    one = report.stages[stage]
    return one.received, one.done, one.filtered, one.dead


def ints(n: int) -> Pipeline:
    """Return a pipeline that produces ``0 … n - 1``."""
    pipeline = Pipeline("test")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(n)

    return pipeline


# --- types that travel ---------------------------------------------------------------------------


@dataclass
class Animal:
    name: str
    tags: list[str] = field(default_factory=list)


@dataclass
class Dog(Animal):
    barks: bool = True


@dataclass
class Cat(Animal):
    lives: int = 9


class Page(BaseModel):
    url: str
    size: int = 0


class Unpicklable:
    def __init__(self, error: type[BaseException] = TypeError) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        raise self.error("not me")


class Unloadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)


class Named(Protocol):
    name: str


class Colour(StrEnum):
    RED = "red"


class Odd(Exception):
    """An exception with a signature of its own: pickles, but can't be loaded."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one}, {two}")


class Plain(Exception):
    """An exception like any other."""


# --- shapes --------------------------------------------------------------------------------------


def test_every_item_goes_through_and_results_come_back(backend: str) -> None:
    pipeline = ints(1000)

    @pipeline.consumer(workers=2)
    def square(i: int) -> int:
        return i * i

    report = run(pipeline, backend)

    assert sorted(report.results) == [i * i for i in range(1000)]
    assert counts(report, "square") == (1000, 1000, 0, 0)
    assert (report.ok, report.stages["numbers"].received, report.stages["square"].emitted) == (
        True,
        1000,
        1000,
    )


def test_objects_go_through_three_stages(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def urls() -> Iterator[Page]:
        for i in range(200):
            yield Page(url=str(i))

    @pipeline.consumer(workers=2)
    def measure(page: Page) -> Page:
        return Page(url=page.url, size=int(page.url) * 2)

    @pipeline.consumer
    def name(page: Page) -> Animal:
        return Animal(page.url, [str(page.size)])

    report = run(pipeline, backend)

    assert sorted(report.results, key=lambda a: int(a.name)) == [
        Animal(str(i), [str(2 * i)]) for i in range(200)
    ]


def test_several_producers_feed_one_consumer(backend: str) -> None:
    pipeline = ints(100)

    @pipeline.producer
    def more() -> list[int]:
        return list(range(100, 150))

    @pipeline.consumer
    def take(i: int) -> int:
        return i

    report = run(pipeline, backend)

    assert sorted(report.results) == list(range(150))
    assert {edge.source: edge.received for edge in report.edges if edge.target == "take"} == {
        "numbers": 100,
        "more": 50,
    }


def test_consumers_that_name_one_source_each_get_everything(backend: str) -> None:
    pipeline = ints(50)

    @pipeline.consumer(source="numbers")
    def double(i: int) -> int:
        return 2 * i

    @pipeline.consumer(source="numbers")
    def spell(i: int) -> str:
        return str(i)

    report = run(pipeline, backend)

    assert Counter(report.results) == Counter([*(2 * i for i in range(50)), *map(str, range(50))])
    assert report.stages["numbers"].emitted == 50


def test_an_item_of_a_union_goes_to_the_takers_of_its_type(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def zoo() -> Iterator[Dog | Cat]:
        for i in range(30):
            yield Dog(str(i)) if i % 3 else Cat(str(i))

    @pipeline.consumer
    def dog(item: Dog) -> str:
        return f"dog {item.name}"

    @pipeline.consumer
    def cat(item: Cat) -> str:
        return f"cat {item.name}"

    report = run(pipeline, backend)

    assert sorted(report.results) == sorted(f"{'dog' if i % 3 else 'cat'} {i}" for i in range(30))
    assert (report.stages["dog"].received, report.stages["cat"].received) == (20, 10)


def test_an_output_that_is_no_member_of_its_union_is_its_job_s_failure(backend: str) -> None:
    pipeline = ints(3)

    @pipeline.consumer
    def pick(i: int) -> Dog | Cat:
        return Cat("c") if i != 1 else Page(url="x")  # type: ignore[return-value]  # the error under test

    report = run(pipeline, backend)

    (letter,) = report.dead
    assert (letter.error, letter.item, letter.stage) == ("PayloadError", 1, "pick")
    assert "Page" in letter.message
    assert counts(report, "pick") == (3, 2, 0, 1)


def test_subclasses_follow_their_base(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def zoo() -> Iterator[Animal]:
        yield from (Dog("rex"), Cat("tom"), Animal("it"))

    @pipeline.consumer
    def kind(item: Animal) -> str:
        return type(item).__name__

    assert sorted(run(pipeline, backend).results) == ["Animal", "Cat", "Dog"]


def test_a_protocol_takes_what_fits_it(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def zoo() -> Iterator[Cat]:
        yield Cat("tom")

    @pipeline.consumer
    def name(item: Named) -> str:
        return item.name

    assert run(pipeline, backend).results == ["tom"]


def test_returning_none_filters_a_job_where_none_is_declared(backend: str) -> None:
    pipeline = ints(100)

    @pipeline.consumer
    def even(i: int) -> int | None:
        return i if i % 2 == 0 else None

    report = run(pipeline, backend)

    assert sorted(report.results) == list(range(0, 100, 2))
    assert counts(report, "even") == (100, 50, 50, 0)


@pytest.mark.parametrize("annotated", [Iterator[int | None], Iterator[Animal | None]], ids=["int", "object"])
def test_a_generator_s_none_is_not_given_on(backend: str, annotated: Any) -> None:
    pipeline = Pipeline("test")

    def source() -> Iterator[Any]:
        for i in range(6):
            yield None if i % 2 else (i if annotated == Iterator[int | None] else Animal(str(i)))

    def split(item: Any) -> Iterator[Any]:
        yield from (item, None)

    source.__annotations__["return"] = split.__annotations__["return"] = annotated
    pipeline.producer(source)
    pipeline.consumer(split)

    report = run(pipeline, backend)

    assert (len(report.results), report.results.count(None)) == (3, 0)
    assert counts(report, "source") == (3, 3, 0, 0)


def test_an_end_stage_gives_no_results(backend: str) -> None:
    pipeline = ints(10)

    @pipeline.consumer
    def end(i: int) -> None: ...

    report = run(pipeline, backend)

    assert (report.results, report.stages["end"].emitted, report.stages["end"].done) == ([], 0, 10)


def test_a_consumer_may_give_none_one_or_many_items(backend: str) -> None:
    pipeline = ints(5)

    @pipeline.consumer
    def repeat(i: int) -> Iterator[str]:
        yield from [str(i)] * i

    @pipeline.consumer
    def upper(text: str) -> str:
        return text + "!"

    report = run(pipeline, backend)

    assert Counter(report.results) == Counter({f"{i}!": i for i in range(1, 5)})
    assert report.stages["repeat"].emitted == 10


def test_a_list_returned_is_one_item_or_many_as_annotated(backend: str) -> None:
    pipeline = ints(1)

    @pipeline.consumer
    def one(i: int) -> list[int]:
        return [i, i]

    @pipeline.consumer
    def many(items: list[int]) -> Iterator[list[int]]:
        return [items, items]  # type: ignore[return-value]  # allowed: "it may also return a list"

    assert run(pipeline, backend).results == [[0, 0], [0, 0]]


def test_a_long_stream_of_one_job_arrives_whole_and_in_order(backend: str) -> None:
    pipeline = ints(1)

    @pipeline.consumer
    def count(_: int) -> Iterator[int]:
        yield from range(3500)

    report = run(pipeline, backend)

    assert report.results == list(range(3500))


def test_outputs_of_a_job_that_fails_are_dropped(backend: str) -> None:
    pipeline = ints(3)

    @pipeline.consumer
    def some(i: int) -> Iterator[int]:
        yield i
        if i == 1:
            raise ValueError
        yield i

    report = run(pipeline, backend)

    assert sorted(report.results) == [0, 0, 2, 2]


def test_a_graph_may_loop_back_and_ends_when_nothing_is_left(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def start() -> Iterator[int]:
        yield 1

    @pipeline.consumer(source=["start", "visit"], key=str, queue_size=3, workers=2)
    def visit(i: int) -> Iterator[int | str]:
        yield f"seen {i}"
        for link in (2 * i, 2 * i + 1, i // 2 or 1):
            if link < 64:
                yield link

    report = run(pipeline, backend)

    assert sorted(report.results) == sorted(f"seen {i}" for i in range(1, 64))
    stage = report.stages["visit"]
    assert (stage.done, stage.filtered) == (63, stage.duplicates)
    assert stage.duplicates == stage.received - 63 > 0


def test_an_empty_producer_ends_the_run(backend: str) -> None:
    pipeline = ints(0)

    @pipeline.consumer
    def take(i: int) -> int:
        return i

    assert run(pipeline, backend).results == []


# --- batches, lanes, order, keys -----------------------------------------------------------------


def test_a_batch_takes_at_most_so_many_items_and_misses_none(backend: str) -> None:
    pipeline = ints(25)

    @pipeline.consumer(batch=10, batch_timeout=20.0)
    def total(batch: list[int]) -> list[int]:
        return batch

    report = run(pipeline, backend)

    assert sorted(i for batch in report.results for i in batch) == list(range(25))
    assert all(1 <= len(batch) <= 10 for batch in report.results)
    assert counts(report, "total") == (25, 25, 0, 0)
    assert report.seconds < 15  # the last, short batch didn't wait for its time


def test_a_batch_that_takes_long_is_not_done_twice(notes: Notes, backend: str) -> None:
    pipeline = ints(4)

    @pipeline.consumer(batch=4, workers=2, batch_timeout=20.0)
    def total(batch: list[int]) -> int:
        for i in batch:
            notes.add(i)
        time.sleep(0.1)  # long enough for the driver to see it as slow
        return sum(batch)

    report = run(pipeline, backend)

    assert sorted(notes.lines()) == ["0", "1", "2", "3"]
    assert sum(report.results) == 6


def test_an_overdue_batch_leaves_before_it_is_full(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    pipeline = Pipeline("test")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield 1
        gate.wait()  # opened by the batch: it comes while we are not through
        yield 2

    @pipeline.consumer(batch=10, batch_timeout=0.01)
    def total(batch: list[int]) -> int:
        if batch == [1]:
            gate.open()  # in this process, for as long as it lives
        return len(batch)

    assert run(pipeline, "pipe").results == [1, 1]


def test_a_failed_batch_is_tried_again_whole_and_dies_item_by_item(backend: str, notes: Notes) -> None:
    pipeline = ints(3)

    @pipeline.consumer(batch=3, batch_timeout=20.0, max_retries=1, min_backoff=0)
    def total(batch: list[int]) -> int:
        notes.add(sorted(batch))
        raise ValueError("never")

    report = run(pipeline, backend)

    assert notes.lines() == ["[0, 1, 2]", "[0, 1, 2]"]
    assert sorted(letter.item for letter in report.dead) == [0, 1, 2]
    assert {letter.attempts for letter in report.dead} == {2}


def test_a_batch_leaves_out_what_is_of_the_wrong_type(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def things() -> Iterator[Any]:
        yield from (1, "two", 3)

    @pipeline.consumer(batch=3, batch_timeout=20.0)
    def total(batch: list[int]) -> int:
        return sum(batch)

    report = run(pipeline, backend)

    assert (sum(report.results), [letter.item for letter in report.dead]) == (4, ["two"])


def test_threads_of_one_worker_work_at_once(notes: Notes) -> None:
    pipeline = ints(4)
    barrier: list[Any] = []

    @pipeline.resource
    def meeting() -> threading.Barrier:
        if not barrier:
            barrier.append(threading.Barrier(4))
        return threading.Barrier(1)

    @pipeline.consumer(concurrency=4)
    def meet(i: int, meeting: threading.Barrier) -> int:
        meeting.wait()
        barrier[0].wait(20)  # nobody passes alone
        notes.add(i)
        return i

    for name in ("pipe", "thread"):
        barrier.clear()
        assert sorted(run(pipeline, name).results) == [0, 1, 2, 3]


def test_tasks_of_one_worker_work_at_once() -> None:
    pipeline = ints(6)
    waiting: list[asyncio.Future[None]] = []

    @pipeline.consumer(concurrency=3)
    async def meet(i: int) -> int:
        me = asyncio.get_running_loop().create_future()
        waiting.append(me)
        if len(waiting) == 3:
            for one in waiting:
                one.set_result(None)
            waiting.clear()
        await asyncio.wait_for(me, 20)  # nobody passes before three are there
        return i

    for name in ("pipe", "thread"):
        assert sorted(run(pipeline, name).results) == list(range(6))


def test_async_functions_work_everywhere(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    async def numbers() -> AsyncIterator[int]:
        for i in range(20):
            await asyncio.sleep(0)
            yield i

    @pipeline.consumer
    async def double(i: int) -> int:
        await asyncio.sleep(0)
        return 2 * i

    @pipeline.consumer
    async def twice(i: int) -> AsyncIterator[str]:
        yield str(i)
        await asyncio.sleep(0)
        yield str(i)

    assert Counter(run(pipeline, backend).results) == Counter({str(2 * i): 2 for i in range(20)})


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("name", ["pipe", "thread"])
def test_lanes_filter_skip_retry_and_fail_as_one_lane_does(name: str, concurrency: int) -> None:
    pipeline = ints(60)

    @pipeline.consumer(concurrency=concurrency, max_retries=1, min_backoff=0)
    def judge(i: int, job: Job) -> int | None:
        if i % 5 == 1:
            raise Skip("odd one")
        if i % 5 == 2:
            raise ValueError(i)
        if i % 5 == 3 and job.attempt == 1:
            raise Retry(0)
        return i if i % 5 != 4 else None

    report = run(pipeline, name)

    assert sorted(report.results) == [i for i in range(60) if i % 5 in (0, 3)]
    assert counts(report, "judge") == (60, 24, 24, 12)
    assert report.stages["judge"].retried == 24


@pytest.mark.parametrize("name", ["pipe", "thread"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["threads", "tasks"])
def test_a_batch_in_lanes_is_a_list(name: str, asynchronous: bool) -> None:
    pipeline = ints(20)

    def total(batch: list[int]) -> list[int]:
        return batch

    async def atotal(batch: list[int]) -> list[int]:
        return batch

    pipeline.consumer(atotal if asynchronous else total, name="total", batch=5, concurrency=2)

    report = run(pipeline, name)

    assert sorted(i for batch in report.results for i in batch) == list(range(20))


def test_an_ordered_stage_keeps_the_order_of_arrival(backend: str) -> None:
    pipeline = ints(300)

    @pipeline.consumer(workers=3, ordered=True, queue_size=20)
    def work(i: int) -> int | None:
        if i % 7 == 0:
            time.sleep(0.001)
        if i % 50 == 9:
            raise ValueError
        return i if i % 10 else None

    report = run(pipeline, backend)

    assert report.results == [i for i in range(300) if i % 10 and i % 50 != 9]
    assert len(report.dead) == 6


def test_an_ordered_stage_waits_for_a_job_that_is_tried_again(backend: str) -> None:
    pipeline = ints(30)

    @pipeline.consumer(workers=2, ordered=True, queue_size=2, max_retries=1, min_backoff=0.01)
    def work(i: int, job: Job) -> int:
        if i % 10 == 0 and job.attempt == 1:
            raise ValueError
        return i

    assert run(pipeline, backend).results == list(range(30))


def test_an_ordered_generator_stage_keeps_parts_together(backend: str) -> None:
    pipeline = ints(4)

    @pipeline.consumer(workers=2, ordered=True)
    def work(i: int) -> Iterator[tuple[int, int]]:
        for n in range(1500 if i % 2 == 0 else 2):
            yield i, n

    expected = [(i, n) for i in range(4) for n in range(1500 if i % 2 == 0 else 2)]
    assert run(pipeline, backend).results == expected


def test_a_key_seen_before_is_a_duplicate(backend: str) -> None:
    pipeline = ints(100)

    @pipeline.consumer(key=lambda i: str(i % 10), workers=2)
    def take(i: int, job: Job) -> str:
        return f"{i} {job.key}"

    report = run(pipeline, backend)

    assert sorted(report.results) == sorted(f"{i} {i}" for i in range(10))
    assert report.stages["take"].duplicates == report.stages["take"].filtered == 90


def test_a_key_that_is_a_kind_of_text_is_one(backend: str) -> None:
    pipeline = ints(3)

    @pipeline.consumer(key=lambda _: Colour.RED)
    def take(i: int) -> int:
        return i

    assert run(pipeline, backend).stages["take"].duplicates == 2


def test_a_key_that_raises_or_is_no_text_is_a_dead_letter_of_the_taker(backend: str) -> None:
    pipeline = ints(4)

    @pipeline.consumer(key=lambda i: {0: "a", 1: 1, 3: "b"}[i])
    def take(i: int) -> int:
        return i

    report = run(pipeline, backend)

    assert sorted(report.results) == [0, 3]
    assert {letter.item: letter.stage for letter in report.dead} == {1: "take", 2: "take"}
    assert "not a str" in " ".join(letter.message for letter in report.dead)
    assert "KeyError" in " ".join(letter.message for letter in report.dead)


# --- resources, parameters, jobs -----------------------------------------------------------------


def test_a_resource_is_opened_once_per_worker_and_closed(backend: str, notes: Notes) -> None:
    pipeline = ints(40)

    @pipeline.resource
    def path(label: str = "default") -> str:
        return f"{label}-path"

    @pipeline.resource
    def db(path: str) -> Iterator[str]:
        notes.add("opened")
        yield path
        notes.add("closed")

    @pipeline.consumer(workers=2)
    def use(i: int, db: str) -> str:
        notes.add("used")
        return db

    report = run(pipeline, backend, label="my")

    assert set(report.results) == {"my-path"}
    told = Counter(notes.lines())
    assert told["used"] == 40
    assert 1 <= told["opened"] == told["closed"] <= 2


@pytest.mark.parametrize("backend", [*PROCESSES, "thread"], indirect=True)
def test_what_a_producer_s_resource_made_is_there_until_all_is_done(backend: str, tmp_path: Path) -> None:
    pipeline = Pipeline("test")

    @pipeline.resource
    def folder() -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=tmp_path) as path:
            yield Path(path)

    @pipeline.producer
    def files(folder: Path) -> Iterator[Path]:
        for number in range(20):
            file = folder / str(number)
            file.write_text(str(number))
            yield file

    @pipeline.consumer(workers=2)
    def read(file: Path) -> Path:
        file.read_text()
        return file

    @pipeline.consumer
    def read_again(file: Path) -> int:
        return int(file.read_text())

    report = run(pipeline, backend)

    assert sorted(report.results) == list(range(20))
    assert list(tmp_path.iterdir()) == []


def test_a_resource_of_lanes_is_opened_per_thread(notes: Notes) -> None:
    pipeline = ints(4)

    @pipeline.resource
    def who() -> Iterator[int]:
        notes.add("opened")
        yield threading.get_ident()
        notes.add("closed")

    @pipeline.consumer(concurrency=3)
    def use(i: int, who: int) -> bool:
        return who == threading.get_ident()

    assert run(pipeline, "pipe").results == [True] * 4
    assert Counter(notes.lines()) == {"opened": 3, "closed": 3}


def test_a_resource_that_can_not_be_opened_ends_the_run_with_its_reason(backend: str) -> None:
    pipeline = ints(3)

    @pipeline.resource
    def db() -> str:
        raise OSError("no such database")

    @pipeline.consumer
    def use(i: int, db: str) -> None: ...

    with pytest.raises(RunFailed, match="no such database") as caught:
        run(pipeline, backend)

    assert caught.value.report is not None
    assert caught.value.report.stages["use"].done == 0


def test_each_worker_of_a_producer_gives_its_shard(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer(workers=3)
    def part(shard: Shard) -> Iterator[int]:
        assert shard.count == 3
        yield from range(shard.index, 30, shard.count)

    @pipeline.consumer
    def take(i: int) -> int:
        return i

    assert sorted(run(pipeline, backend).results) == list(range(30))


def test_parameters_of_the_run_reach_whoever_names_them(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def numbers(n: int, start: int = 0) -> Iterator[int]:
        yield from range(start, n)

    pipeline.producer(numbers, name="others", params={"n": 102, "start": 100})

    @pipeline.consumer
    def add(i: int, delta: int = 0) -> int:
        return i + delta

    assert sorted(run(pipeline, backend, n="3", delta=1000).results) == [1000, 1001, 1002, 1100, 1101]
    with pytest.raises(PipelineError, match="n"):
        run(pipeline, backend)
    with pytest.raises(PipelineError, match="nonsense"):
        run(pipeline, backend, n=1, nonsense=2)


def test_a_job_knows_itself(backend: str) -> None:
    pipeline = ints(3)

    @pipeline.consumer(max_retries=2, min_backoff=0)
    def who(i: int, job: Job) -> tuple[str, str, int, int, str | None, bool]:
        if job.attempt < 3:
            raise ValueError
        return job.id, job.stage, job.attempt, job.delivery, job.key, job.stopping

    results = run(pipeline, backend).results

    assert len({one[0] for one in results}) == 3
    assert {one[1:] for one in results} == {("who", 3, 1, None, False)}


def test_the_item_need_not_be_the_first_parameter(backend: str) -> None:
    pipeline = ints(2)

    @pipeline.consumer
    def take(job: Job, *, item: int, scale: int = 10) -> int:
        return item * scale

    assert sorted(run(pipeline, backend).results) == [0, 10]


@pytest.mark.parametrize("done", [1, 0.5, Decimal("0.5"), True], ids=repr)
def test_any_number_says_how_far_a_job_is(backend: str, done: Any) -> None:
    pipeline = ints(1)

    @pipeline.consumer
    def take(i: int, job: Job) -> int:
        job.progress(done, 2)
        job.total(3)
        return i

    assert run(pipeline, backend).ok


# --- failures ------------------------------------------------------------------------------------


def test_a_failed_job_is_a_dead_letter_and_harms_no_other(backend: str) -> None:
    pipeline = ints(100)

    @pipeline.consumer(workers=2)
    def check(i: int) -> int:
        if i % 10 == 3:
            raise Plain(f"no {i}")
        return i

    report = run(pipeline, backend)

    assert sorted(report.results) == [i for i in range(100) if i % 10 != 3]
    assert sorted(letter.item for letter in report.dead) == list(range(3, 100, 10))
    letter = report.dead[0]
    assert (letter.stage, letter.error, letter.message) == ("check", "Plain", f"no {letter.item}")
    assert (letter.status, letter.attempts, letter.deliveries, letter.item_type) == ("dead", 1, 1, "int")
    assert "raise Plain(f" in letter.traceback
    assert (letter.run, letter.pipeline, letter.key) == (report.run, "test", None)


def test_three_retries_are_four_calls(backend: str, notes: Notes) -> None:
    pipeline = ints(2)

    @pipeline.consumer(max_retries=3, min_backoff=0.001, max_backoff=0.002)
    def check(i: int, job: Job) -> int:
        notes.add(f"{i} {job.attempt}")
        if i == 1:
            raise ValueError
        return i

    report = run(pipeline, backend)

    assert sorted(notes.lines()) == ["0 1", "1 1", "1 2", "1 3", "1 4"]
    assert (report.stages["check"].retried, report.dead[0].attempts) == (3, 4)


def test_only_the_named_types_are_retried(backend: str, notes: Notes) -> None:
    pipeline = ints(2)

    @pipeline.consumer(max_retries=2, min_backoff=0, retry_on=(LookupError,))
    def check(i: int) -> None:
        notes.add(i)
        raise (KeyError if i else ValueError)

    run(pipeline, backend)

    assert sorted(notes.lines()) == ["0", "1", "1", "1"]


def test_a_job_may_reject_skip_or_ask_for_another_try(backend: str) -> None:
    pipeline = ints(4)

    @pipeline.consumer(max_retries=5)
    def steer(i: int, job: Job) -> int:
        if i == 0:
            raise Reject("not this one")
        if i == 1:
            raise Skip("nor this")
        if i == 2 and job.attempt < 3:
            raise Retry(delay=0.001)
        return i * 10 + job.attempt

    report = run(pipeline, backend)

    assert sorted(report.results) == [23, 31]
    assert counts(report, "steer") == (4, 2, 1, 1)
    assert [(letter.error, letter.message) for letter in report.dead] == [("Reject", "not this one")]


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), BaseException("bare")], ids=repr
)
@pytest.mark.parametrize("concurrency", [1, 2])
def test_whatever_a_job_raises_is_its_own_failure(
    backend: str, error: BaseException, concurrency: int
) -> None:
    pipeline = ints(5)

    @pipeline.consumer(concurrency=concurrency)
    def check(i: int) -> int:
        if i == 2:
            raise error
        return i

    report = run(pipeline, backend)

    assert sorted(report.results) == [0, 1, 3, 4]
    assert [letter.error for letter in report.dead] == [type(error).__name__]
    assert report.stages["check"].worker_restarts == 0


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_whatever_an_async_job_raises_is_its_own_failure(name: str, error: BaseException) -> None:
    for concurrency in (1, 2):
        pipeline = ints(5)

        @pipeline.consumer(concurrency=concurrency)
        async def check(i: int) -> int:
            if i == 2:
                raise error
            await asyncio.sleep(0)
            return i

        report = run(pipeline, name)

        assert sorted(report.results) == [0, 1, 3, 4]
        assert [letter.error for letter in report.dead] == [type(error).__name__]
        assert report.stages["check"].worker_restarts == 0


class Deaf(Exception):
    """An exception to which nothing can be added."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


def test_exceptions_say_which_job_of_which_stage_they_are_of(backend: str) -> None:
    pipeline = Pipeline("test")
    long = "x" * 300

    @pipeline.producer
    def texts() -> Iterator[str]:
        yield from ("plain\n", long, "odd", "fine")
        raise KeyError("no more")

    @pipeline.consumer
    def parse(text: str) -> None:
        if text.startswith("plain"):
            raise Plain("plain")
        if text == long:
            raise Deaf("deaf")
        if text == "odd":
            raise Odd(1, 2)

    with pytest.raises(JobsFailed) as caught:
        pipeline.run(backend=backend)

    notes = {type(error).__name__: error.__notes__ for error in caught.value.exceptions}
    assert notes == {
        "Plain": [r"stage parse, job 0, item 'plain\n'"],
        "Deaf": [f"stage parse, job 1, item '{'x' * 198}…"],
        "JobqError": ["item 'odd'"],  # its message says the rest
        "KeyError": ["stage texts, the producer"],
    }
    deaf = next(error for error in caught.value.exceptions if isinstance(error, Deaf))
    assert "raise Deaf(" in str(deaf.__cause__)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_exception_of_a_job_that_nobody_could_ask_says_its_item_and_nothing_twice(name: str) -> None:
    pipeline = ints(3)

    @pipeline.consumer(max_deliveries=1)
    def check(i: int) -> list[int]:
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return [i]

    @pipeline.consumer(max_deliveries=1)
    def kill(some: list[int]) -> None:
        if some == [2]:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(JobsFailed) as caught:
        pipeline.run(backend=name)

    told = {str(error).partition(":")[0]: error.__notes__ for error in caught.value.exceptions}
    assert told == {"stage check, job 1": ["item 1"], "stage kill, job 1": ["item [2]"]}


@pytest.mark.parametrize(("failing", "told"), [(1, "1 dead letter"), (2, "2 dead letters")])
def test_dead_letters_are_told_in_the_right_number(failing: int, told: str) -> None:
    pipeline = ints(failing)

    @pipeline.consumer
    def check(i: int) -> None:
        raise ValueError(i)

    with pytest.raises(JobsFailed) as caught:
        pipeline.run(backend="inline")

    assert caught.value.message == f"pipeline 'test': {told}"


def test_a_run_with_dead_letters_raises_them_at_its_end(backend: str) -> None:
    pipeline = ints(5)

    @pipeline.consumer
    def check(i: int) -> int:
        if i == 1:
            raise Plain("plain")
        if i == 2:
            raise Odd(1, 2)
        if i == 3:
            raise SystemExit("gone")
        return i

    with pytest.raises(JobsFailed) as caught:
        pipeline.run(backend=backend, collect=True)

    group = caught.value
    assert isinstance(group, ExceptionGroup)
    assert isinstance(group, JobqError)
    plain, odd, gone = sorted(group.exceptions, key=lambda one: ["plain", "1, 2", "gone"].index(_last(one)))
    assert type(plain) is Plain
    assert "raise Plain(" in str(plain.__cause__)
    assert isinstance(odd, JobqError)
    assert "Odd: 1, 2" in str(odd)
    assert isinstance(gone, JobqError)
    assert "SystemExit: gone" in str(gone)
    assert sorted(group.report.results) == [0, 4]
    assert len(group.report.dead) == 3


def _last(error: BaseException) -> str:
    return str(error).rpartition(": ")[2]


def test_jobs_failed_holds_the_first_hundred_and_the_report_all(backend: str) -> None:
    pipeline = ints(150)

    @pipeline.consumer
    def check(i: int) -> None:
        raise ValueError(i)

    with pytest.raises(JobsFailed, match="150") as caught:
        pipeline.run(backend=backend)

    assert len(caught.value.exceptions) == 100
    assert len(caught.value.report.dead) == 150


def test_unchecked_a_run_returns_its_report_whatever_failed(backend: str) -> None:
    pipeline = ints(2)

    @pipeline.consumer
    def check(i: int) -> None:
        raise ValueError(i)

    report = pipeline.run(backend=backend, check=False)

    assert (report.ok, len(report.dead)) == (False, 2)


def test_a_producer_that_raises_half_way_is_one_dead_letter_and_what_it_gave_is_finished(
    backend: str,
) -> None:
    pipeline = ints(20)

    @pipeline.producer
    def broken() -> Iterator[int]:
        yield from range(100, 110)
        raise OSError("disk gone")

    @pipeline.consumer
    def take(i: int) -> int:
        return i

    report = run(pipeline, backend)

    assert sorted(report.results) == [*range(20), *range(100, 110)]
    (letter,) = report.dead
    assert (letter.stage, letter.item, letter.job, letter.error) == ("broken", None, None, "OSError")
    assert "disk gone" in letter.message
    assert counts(report, "broken") == (11, 10, 0, 1)


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_whatever_a_producer_raises_is_its_own_failure(backend: str, error: BaseException) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def broken() -> Iterator[int]:
        yield 1
        raise error

    @pipeline.consumer
    def take(i: int) -> int:
        return i

    report = run(pipeline, backend)

    assert (report.results, [letter.error for letter in report.dead]) == ([1], [type(error).__name__])


def test_at_the_last_allowed_failure_the_rest_is_cancelled(backend: str) -> None:
    pipeline = ints(100_000)

    @pipeline.consumer(workers=2)
    def check(i: int) -> int:
        if i >= 10:
            raise ValueError(i)
        return i

    report = run(pipeline, backend, max_failures=3)

    assert report.stages["check"].dead >= 3
    assert report.stages["check"].received < 100_000
    assert not report.ok


@pytest.mark.parametrize("wants_job", [False, True])
def test_no_job_begins_after_the_last_allowed_failure(backend: str, wants_job: bool, notes: Notes) -> None:
    pipeline = ints(3000)
    if wants_job:

        @pipeline.consumer
        def check(i: int, job: Job) -> None:
            if i >= 500:
                notes.add(i)
                raise ValueError(i)

    else:

        @pipeline.consumer(name="check")
        def quick(i: int) -> None:
            if i >= 500:
                notes.add(i)
                raise ValueError(i)

    report = run(pipeline, backend, max_failures=3)

    assert notes.lines() == ["500", "501", "502"]
    assert (report.stages["check"].done, report.stages["check"].dead) == (500, 3)


def test_a_result_that_can_t_be_loaded_is_told_and_the_run_is_not_fine() -> None:
    pipeline = ints(3)

    @pipeline.consumer
    def work(i: int) -> Any:
        return Unloadable() if i == 1 else i

    report = pipeline.run(backend="pipe", collect=True, check=False)

    assert (report.results, report.ok) == ([0, 2], False)
    (letter,) = report.dead
    assert (letter.stage, letter.error) == ("work", "PayloadError")
    assert "a result of work() could not be loaded: ValueError: invalid literal" in letter.message

    with pytest.raises(JobsFailed, match="0 dead letters, 1 result that could not be loaded") as caught:
        pipeline.run(backend="pipe", collect=True)
    assert [str(error) for error in caught.value.exceptions] == [letter.message]
    assert caught.value.report.results == [0, 2]

    seen = []
    stream = pipeline.stream(backend="pipe", check=False)
    with pytest.raises(PayloadError, match=r"a result of work\(\) could not be loaded"):
        while True:
            seen.append(next(stream))
    seen += list(stream)
    assert sorted(seen) == [0, 2]
    assert stream.report is not None
    assert not stream.report.ok


def test_a_batch_that_its_bytes_keep_from_filling_leaves_at_once(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def blobs() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(3000)

    @pipeline.consumer(batch=10, batch_timeout=1000, queue_bytes=10_000)
    def take(items: list[bytes]) -> int:
        return len(items)

    report = run(pipeline, backend)

    assert sum(report.results) == 20


@pytest.mark.parametrize("kind", [int, Any])
def test_a_producer_s_none_is_not_given_on(backend: str, kind: Any) -> None:
    pipeline = Pipeline("test")

    def numbers() -> Any:
        yield 1
        yield None
        yield 2

    numbers.__annotations__["return"] = Iterator[kind]
    pipeline.producer(numbers)

    assert run(pipeline, backend).results == [1, 2]


# --- files -----------------------------------------------------------------------------------------


def kept(tmp_path: Path, name: str, text: str = "1\n2\n") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("written", ["output", "dead_letters"])
def test_a_run_does_not_write_over_what_it_reads(written: str, tmp_path: Path) -> None:
    given = kept(tmp_path, "in.jsonl")
    pipeline = ints(1)

    @pipeline.consumer
    def work(i: int) -> int:
        return i

    for path in (given, tmp_path / "." / "in.jsonl"):
        with pytest.raises(PipelineError, match="which is the run's input: name another file"):
            pipeline.run(input=given, **{written: path})
    with pytest.raises(PipelineError, match=r"which is where work\(\) is defined"):
        pipeline.run(**{written: Path(__file__)})
    with pytest.raises(PipelineError, match="can't both go to"):
        pipeline.run(output=tmp_path / "out", dead_letters=tmp_path / "out")

    assert given.read_text() == "1\n2\n"


@pytest.mark.parametrize(
    ("how", "written"),
    [("run", "output"), ("run", "dead_letters"), ("stream", "dead_letters"), ("open", "dead_letters")],
)
def test_what_can_t_be_written_is_said_before_anything_starts(
    how: str, written: str, notes: Notes, tmp_path: Path
) -> None:
    pipeline = ints(1)

    @pipeline.consumer
    def work(i: int) -> int:
        notes.add(i)
        return i

    words = {"output": "results", "dead_letters": "dead letters"}[written]
    for place, why in ((tmp_path / "no" / "where", "there is no folder"), (tmp_path, "it is a folder")):
        with pytest.raises(PipelineError, match=f"can't write {words} to .*: {why}"):
            getattr(pipeline, how)(**{written: place})
    assert notes.lines() == []


def test_a_wrong_definition_leaves_the_last_output_alone(tmp_path: Path) -> None:
    output = kept(tmp_path, "out.jsonl")
    pipeline = ints(1)

    @pipeline.consumer
    def work(i: str) -> str:
        return i

    with pytest.raises(PipelineError):
        pipeline.run(output=output)

    assert output.read_text() == "1\n2\n"


def test_output_is_written_anew(tmp_path: Path) -> None:
    output = kept(tmp_path, "out.jsonl", "much that was there before\n" * 10)
    pipeline = ints(2)

    @pipeline.consumer
    def work(i: int) -> int:
        return i

    pipeline.run(output=output)

    assert sorted(output.read_text().split()) == ["0", "1"]


def test_results_are_either_returned_or_written(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="ask for one of the two"):
        ints(1).run(collect=True, output=tmp_path / "out.jsonl")
    for option in ({"collect": True}, {"output": tmp_path / "out.jsonl"}):
        with pytest.raises(PipelineError, match=r"stream\(\) has no use for"):
            ints(1).stream(**option)


def test_a_default_of_the_pipeline_that_a_method_has_no_use_for_is_none(tmp_path: Path) -> None:
    pipeline = Pipeline("test", collect=True, input=tmp_path / "items.jsonl", backend="inline")
    (tmp_path / "items.jsonl").write_text("1\n2\n")

    @pipeline.consumer
    def work(i: int) -> int:
        return i

    assert pipeline.run().results == list(pipeline.stream()) == [1, 2]
    with pipeline.open() as run:
        assert run.submit(3).result() == 3


def test_a_keyword_that_may_be_option_or_parameter_is_refused(tmp_path: Path) -> None:
    """Else a program that means its own parameter has its file overwritten, or its run cut short."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    pipeline = ints(2)
    written = []

    @pipeline.resource
    def place(output: Path = Path("nowhere")) -> Path:
        return output

    @pipeline.consumer
    def work(i: int, place: Path, timeout: float = 10.0, input: int = 0) -> None:  # noqa: A002
        written.append((i, place, timeout, input))

    with pytest.raises(PipelineError) as caught:
        pipeline.run(output=precious, timeout=5, backend="inline")
    pipeline.run(timeout=60, params={"output": precious, "timeout": 7, "input": 1}, backend="inline")

    assert precious.read_text() == "precious"
    assert [text.split(" ")[0] for text in caught.value.problems] == ["output=...", "timeout=..."]
    assert "place() (" in caught.value.problems[0]
    assert "params={'timeout': ...}" in caught.value.problems[1]
    assert written == [(0, precious, 7.0, 1), (1, precious, 7.0, 1)]


def test_a_producer_s_default_is_that_of_the_run(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def numbers(tag: str = "dog") -> Iterator[int]:
        yield len(tag)

    @pipeline.resource
    def named(tag: str) -> str:
        return tag.upper()

    @pipeline.consumer
    def work(i: int, named: str, tag: str) -> tuple[int, str, str]:
        return i, named, tag

    pipeline.check()
    assert pipeline.run(backend=backend, collect=True).results == [(3, "DOG", "dog")]
    assert pipeline.run(backend=backend, collect=True, tag="horse").results == [(5, "HORSE", "horse")]
    with pipeline.open(backend=backend) as run:
        assert run.submit(1).result() == (1, "DOG", "dog")


def test_a_name_that_is_no_parameter_of_the_run_is_the_option(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text("1\n")
    pipeline = Pipeline("test", backend="inline")

    @pipeline.resource
    def output() -> str:
        return "mine"

    @pipeline.consumer
    def work(input: int, output: str) -> str:  # noqa: A002  # the item
        return f"{output} {input}"

    assert pipeline.run(input=tmp_path / "items.jsonl", collect=True).results == ["mine 1"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"params": 3}, "params= takes a dict of parameters by name, got 3"),
        ({"params": {3: 1}}, "params= takes a dict of parameters by name"),
        ({"params": {"n": 1}, "n": 2}, "the parameter 'n' is given twice"),
    ],
)
def test_parameters_that_make_no_sense_are_said(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(PipelineError, match=problem):
        ints(1).run(**given)


@pytest.mark.parametrize(
    ("source", "problem"),
    [(3, "source= takes stage functions or names, got 3"), ([], "source= names no stage")],
)
def test_a_source_that_makes_no_sense_is_said(source: Any, problem: str) -> None:
    with pytest.raises(PipelineError, match=problem):

        @ints(1).consumer(source=source)
        def work(i: int) -> None: ...


# --- several readers -------------------------------------------------------------------------------


def test_a_stream_has_one_reader_at_a_time(backend: str) -> None:
    pipeline = ints(1)

    with pipeline.stream(backend=backend) as stream:
        reading = stream._reading
        assert reading.acquire(blocking=False)  # as another thread's next() does
        try:
            with pytest.raises(JobqError, match="is being read already"):
                next(stream)
        finally:
            reading.release()
        assert list(stream) == [0]


def test_the_end_at_max_failures_says_so_and_names_what_was_cancelled(backend: str) -> None:
    pipeline = ints(100)

    @pipeline.consumer
    def check(i: int) -> None:
        raise ValueError(i)

    with pytest.raises(JobsFailed) as caught:
        pipeline.run(backend=backend, fail_fast=True)

    report = caught.value.report
    assert report.stages["check"].dead >= 1
    assert report.stages["check"].cancelled == report.stages["check"].received - report.stages["check"].dead
    statuses = Counter(letter.status for letter in report.dead)
    assert statuses["cancelled"] == report.stages["check"].cancelled


# --- what travels --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["thread", "inline"])
def test_without_processes_items_travel_by_reference(name: str) -> None:
    one = Unpicklable()
    pipeline = Pipeline("test")

    @pipeline.producer
    def things() -> Iterator[Unpicklable]:
        yield one

    @pipeline.consumer
    def keep(thing: Unpicklable) -> Unpicklable:
        return thing

    assert run(pipeline, name).results[0] is one


@pytest.mark.parametrize("error", [TypeError, SystemExit])
@pytest.mark.parametrize("name", PROCESSES)
def test_an_item_that_can_not_be_pickled_is_a_dead_letter_of_its_producer(
    name: str, error: type[BaseException]
) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def things() -> Iterator[object]:
        yield 1
        yield Unpicklable(error)
        yield 3

    @pipeline.consumer
    def take(thing: object) -> object:
        return thing

    report = run(pipeline, name)

    (letter,) = report.dead
    assert sorted(report.results) == [1, 3]
    assert (letter.stage, letter.error, letter.item_type) == ("things", "PayloadError", "Unpicklable")
    assert "pickled" in letter.message
    assert "not me" in letter.message
    line = test_an_item_that_can_not_be_pickled_is_a_dead_letter_of_its_producer.__code__.co_firstlineno
    assert f"test_run.py:{line + 10}" in letter.message  # the very yield


@pytest.mark.parametrize("annotated", [int, object], ids=["scalar", "object"])
@pytest.mark.parametrize("where", ["producer", "consumer", "generator"])
@pytest.mark.parametrize("name", PROCESSES)
def test_one_output_that_can_not_be_pickled_costs_no_other_item(
    name: str, where: str, annotated: Any
) -> None:
    pipeline = Pipeline("test")

    def things() -> Iterator[Any]:
        for i in range(9):
            yield Unpicklable() if where == "producer" and i == 4 else i

    def one(i: Any) -> Any:
        return Unpicklable() if i == 4 else i

    def many(i: Any) -> Iterator[Any]:
        yield one(i)

    things.__annotations__["return"] = many.__annotations__["return"] = Iterator[annotated]
    one.__annotations__["return"] = annotated
    pipeline.producer(things)
    pipeline.consumer({"generator": many}.get(where, one), name="give")

    report = run(pipeline, name)

    (letter,) = report.dead
    assert sorted(report.results) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert (letter.error, letter.stage) == ("PayloadError", "things" if where == "producer" else "give")
    assert all(stage.worker_restarts == 0 for stage in report.stages.values())


@pytest.mark.parametrize(
    ("wanted", "wrong", "says"),
    [
        (int, "text", "int"),
        (float, "1.0", "float"),
        (Animal, Page(url="x"), "Animal"),
        (Animal, Animal(name=5), "name"),  # type: ignore[arg-type]  # the error under test
        (list[int], [1, "2"], "1"),
        (dict[str, int], {"a": "b"}, "a"),
        (Page, {"url": "x"}, "Page"),
    ],
    ids=str,
)
def test_an_item_of_the_wrong_type_is_a_dead_letter_that_is_never_retried(
    wanted: Any, wrong: Any, says: str
) -> None:
    for name in ONE_OF_EACH:
        pipeline = Pipeline("test")

        @pipeline.producer
        def things() -> Iterator[Any]:
            yield wrong

        def take(thing: Any) -> int:
            return 1

        take.__annotations__["thing"] = wanted
        pipeline.consumer(take, max_retries=3)

        report = run(pipeline, name)

        (letter,) = report.dead
        assert (letter.stage, letter.error, letter.attempts) == ("take", "PayloadError", 1)
        assert says in letter.message
        assert report.results == []


@pytest.mark.parametrize(
    ("wanted", "item"),
    [(float, 1), (Any, object), (Animal, Dog("rex")), (list[float], [1, 2.0]), (Page, Page(url="x"))],
    ids=str,
)
def test_validation_judges_and_does_not_convert(wanted: Any, item: Any) -> None:
    for name in ONE_OF_EACH:
        pipeline = Pipeline("test")

        @pipeline.producer
        def things() -> Iterator[Any]:
            yield item

        def take(thing: Any) -> Any:
            return thing

        take.__annotations__["thing"] = wanted
        pipeline.consumer(take)

        (result,) = run(pipeline, name).results

        assert result == item
        assert type(result) is type(item)


def test_validation_can_be_switched_off(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def things() -> Iterator[Any]:
        yield "text"

    @pipeline.consumer(validate=False)
    def take(thing: int) -> int:
        return thing

    assert run(pipeline, backend).results == ["text"]


def test_a_large_item_travels_whole(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def large() -> Iterator[bytes]:
        for i in range(4):
            yield bytes([i]) * 3_000_000

    @pipeline.consumer(queue_bytes=1_000_000)
    def take(data: bytes) -> bytes:
        return data

    results = run(pipeline, backend).results

    assert sorted((one[0], len(one)) for one in results) == [(i, 3_000_000) for i in range(4)]


# --- streams -------------------------------------------------------------------------------------


def test_a_stream_gives_results_as_they_come(backend: str) -> None:
    pipeline = ints(3000)

    @pipeline.consumer(workers=2)
    def square(i: int) -> int:
        return i * i

    stream = pipeline.stream(backend=backend)

    assert sorted(stream) == [i * i for i in range(3000)]
    assert stream.report is not None
    assert stream.report.stages["square"].done == 3000


def test_a_stream_starts_with_its_first_result_wanted(notes: Notes, backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        notes.add("begun")
        yield 1

    @pipeline.consumer
    def take(i: int) -> int:
        return i

    stream = pipeline.stream(backend=backend)
    assert notes.lines() == []

    assert next(stream) == 1
    assert notes.lines() == ["begun"]
    with pytest.raises(StopIteration):
        next(stream)


def test_a_stream_left_half_way_stops_its_run(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def endless() -> Iterator[int]:
        i = 0
        while True:
            yield i
            i += 1

    @pipeline.consumer(workers=2)
    def take(i: int) -> int:
        return i

    with pipeline.stream(backend=backend) as stream:
        for number, _ in enumerate(stream):
            if number == 50:
                break

    report = stream.report
    assert report is not None
    stage = report.stages["take"]
    assert stage.received == stage.done + stage.filtered + stage.dead + stage.cancelled


def test_a_stream_that_nobody_reads_waits(backend: str, notes: Notes) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def endless() -> Iterator[int]:
        i = 0
        while True:
            yield i
            i += 1

    @pipeline.consumer(queue_size=10)
    def take(i: int) -> int:
        notes.add(i)
        return i

    with pipeline.stream(backend=backend) as stream:
        got = [next(stream) for _ in range(20)]
        seen = -1
        while seen != (seen := len(notes.lines())):  # until it stands still
            time.sleep(0.02)

    assert len(got) == 20
    assert seen < 20 + 4000


def test_a_stream_raises_at_its_end_what_failed(backend: str) -> None:
    pipeline = ints(5)

    @pipeline.consumer
    def take(i: int) -> int:
        if i == 2:
            raise Plain("two")
        return i

    got = []
    with pytest.raises(JobsFailed) as caught:
        for item in pipeline.stream(backend=backend):
            got.append(item)  # noqa: PERF402  # what came before the error is wanted

    assert sorted(got) == [0, 1, 3, 4]
    assert isinstance(caught.value.exceptions[0], Plain)


def test_an_error_in_the_reader_s_loop_is_the_reader_s(backend: str) -> None:
    pipeline = ints(1000)

    @pipeline.consumer
    def take(i: int) -> int:
        return i

    with pytest.raises(ZeroDivisionError), pipeline.stream(backend=backend) as stream:
        for _ in stream:
            raise ZeroDivisionError


# --- back-pressure -------------------------------------------------------------------------------


@pytest.mark.parametrize("annotated", [int, Animal], ids=["scalar", "object"])
@pytest.mark.parametrize("name", [*PROCESSES, "thread"])
def test_no_more_items_wait_than_the_queue_holds(name: str, annotated: Any, tmp_path: Path) -> None:
    size, given, gate = 10, Notes(tmp_path / "given"), Gate(tmp_path / "gate")
    pipeline = Pipeline("test")

    def source() -> Iterator[Any]:
        for i in range(300):
            given.add("x")
            yield i if annotated is int else Animal(str(i))

    def sink(item: Any) -> int:
        number = item if annotated is int else int(item.name)
        if number == 250:
            gate.wait()
        return len(given.lines()) - (number + 1)  # produced, and not begun

    source.__annotations__["return"] = Iterator[annotated]
    sink.__annotations__["item"] = annotated
    pipeline.producer(source)
    pipeline.consumer(sink, queue_size=size)

    def look() -> None:
        last = -1
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and len(given.lines()) < 250:
            time.sleep(0.001)
        while time.monotonic() < deadline and last != (last := len(given.lines())):
            time.sleep(0.05)
        gate.open()

    # A process, not a thread: beside threads jobq would not fork.
    watcher = os.fork()
    if watcher == 0:
        with contextlib.suppress(BaseException):
            look()
            signal.pause()
        os._exit(0)
    try:
        waiting = run(pipeline, name).results
    finally:
        os.kill(watcher, signal.SIGKILL)
        os.waitpid(watcher, 0)

    assert len(waiting) == 300
    assert max(waiting) <= size


def test_inline_no_more_items_wait_than_the_queue_holds() -> None:
    given: list[int] = []
    pipeline = Pipeline("test")

    @pipeline.producer
    def source() -> Iterator[int]:
        for i in range(300):
            given.append(i)
            yield i

    @pipeline.consumer(queue_size=10)
    def sink(i: int) -> int:
        return len(given) - (i + 1)

    assert max(run(pipeline, "inline").results) <= 10


# --- embedding -----------------------------------------------------------------------------------


def test_a_run_leaves_signal_handlers_as_they_were(backend: str) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    pipeline = ints(1)

    @pipeline.consumer
    def take(i: int) -> None: ...

    run(pipeline, backend)

    assert [signal.getsignal(number) for number in numbers] == before


def test_a_run_beside_other_threads_works(backend: str) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        report = module_level().run(backend=backend, collect=True)
    finally:
        done.set()
        thread.join()

    assert sorted(report.results) == [0, 2, 4]


def numbers_0_to_2() -> Iterator[int]:
    yield from range(3)


def twice(i: int) -> int:
    return 2 * i


def module_level() -> Pipeline:
    """Return a pipeline that any start method can run."""
    pipeline = Pipeline("module level")
    pipeline.producer(numbers_0_to_2)
    pipeline.consumer(twice)
    return pipeline


def test_a_run_in_another_thread_works(backend: str) -> None:
    got: list[Report] = []
    thread = threading.Thread(target=lambda: got.append(module_level().run(backend=backend, collect=True)))
    thread.start()
    thread.join(30)

    assert sorted(got[0].results) == [0, 2, 4]


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("name", ["joinable", "pipe"])
def test_every_start_method_runs_the_same_pipeline(name: str, method: str) -> None:
    assert sorted(run(module_level(), name, start_method=method).results) == [0, 2, 4]


def test_a_pipeline_can_run_again_and_again(backend: str) -> None:
    pipeline = ints(5)

    @pipeline.consumer
    def take(i: int) -> int:
        return i

    assert [sorted(run(pipeline, backend).results) for _ in range(3)] == [[0, 1, 2, 3, 4]] * 3


def test_a_pipeline_without_a_producer_or_with_nobody_reached_is_refused(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.consumer
    def take(i: int) -> int:
        return i

    with pytest.raises(PipelineError):
        run(pipeline, backend)


def test_results_are_written_as_json_lines(backend: str, tmp_path: Path) -> None:
    pipeline = ints(10)

    @pipeline.consumer
    def page(i: int) -> Page:
        return Page(url=str(i), size=i)

    pipeline.run(backend=backend, output=tmp_path / "out.jsonl")

    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert sorted(Page.model_validate_json(line).size for line in lines) == list(range(10))


def test_what_a_job_prints_and_leaves_in_a_buffer_is_not_lost(tmp_path: Path) -> None:
    """Processes leave by `os._exit`: what lies in a buffer is flushed before."""
    script = tmp_path / "prints.py"
    script.write_text(
        "import sys\n"
        "from collections.abc import Iterator\n"
        "from jobq import Pipeline\n"
        "p = Pipeline('prints')\n"
        "@p.producer\n"
        "def ints() -> Iterator[int]: yield from range(3)\n"
        "@p.consumer\n"
        "def show(i: int) -> None: print('job', i)\n"
        "if __name__ == '__main__': p.run(backend=sys.argv[1])\n"
    )
    for name in ONE_OF_EACH:
        told = subprocess.run(
            [sys.executable, str(script), name], capture_output=True, text=True, timeout=30, check=True
        )

        assert sorted(told.stdout.split("\n")) == ["", "job 0", "job 1", "job 2"]
        assert told.stderr == ""


def test_a_report_tells_in_a_few_lines_how_the_run_went(backend: str) -> None:
    pipeline = ints(1200)

    @pipeline.consumer(max_retries=1, min_backoff=0)
    def check(i: int) -> str | None:
        if i == 1:
            raise ValueError("an item that nobody wants to see")
        return "result" if i < 3 else None

    report = run(pipeline, backend)

    assert str(report).splitlines() == [
        f"pipeline 'test', run {report.run}: not ok, {report.seconds:.1f} s, 2 results, 1 dead letter",
        "  numbers: 1,200 received, 1,200 done",
        "  check: 1,200 received, 2 done, 1,197 filtered, 1 dead, 1 retried",
    ]
    assert "nobody wants to see" in repr(report)


def test_reports_can_be_pickled(backend: str) -> None:
    report = run(module_level(), backend)

    assert pickle.loads(pickle.dumps(report)).results == report.results


def test_payload_errors_are_payload_errors_in_the_group(backend: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def things() -> Iterator[Any]:
        yield "text"

    @pipeline.consumer
    def take(i: int) -> None: ...

    with pytest.raises(JobsFailed) as caught:
        pipeline.run(backend=backend)

    (error,) = caught.value.exceptions
    assert isinstance(error, PayloadError)
    assert "take" in str(error)


def test_an_annotation_that_cannot_be_pickled_is_nobody_s_business(backend: str) -> None:
    pipeline = ints(3)
    note = object()  # what a library puts beside a type, made where it can't be found by name
    kind = Annotated[int, lambda: note]

    def wrap(i: int) -> dict[str, int]:
        return {"i": i}

    wrap.__annotations__["i"] = kind
    pipeline.consumer(wrap)

    report = pipeline.run(backend=backend, collect=True)

    assert sorted(result["i"] for result in report.results) == [0, 1, 2]


def shared() -> Pipeline:
    """Return a pipeline of which two consumers take what the producer gives."""
    pipeline = Pipeline("shared")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield 0

    @pipeline.consumer(source=numbers)
    def first(i: int) -> str:
        return f"first {i}"

    @pipeline.consumer(source=numbers)
    def second(i: int) -> str:
        return f"second {i}"

    return pipeline


def test_who_would_take_a_producers_items_takes_those_of_a_file(backend: str, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_bytes(b"\xef\xbb\xbf1\n2\n")  # as some editors begin a file

    report = shared().run(input=tmp_path / "items.jsonl", backend=backend, collect=True)

    assert sorted(report.results) == ["first 1", "first 2", "second 1", "second 2"]


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_items_may_come_through_a_pipe(start_method: str, tmp_path: Path) -> None:
    def lines(path: Path) -> None:
        path.write_text("5\n")

    reader, writer = os.pipe()
    os.write(writer, b"5\n")
    os.close(writer)
    pipeline = Pipeline("piped")
    pipeline.consumer(same)
    os.mkfifo(tmp_path / "fifo")
    given = multiprocessing.get_context("fork").Process(target=lines, args=(tmp_path / "fifo",))

    through = pipeline.run(input=Path(f"/dev/fd/{reader}"), start_method=start_method, collect=True)
    given.start()
    named = pipeline.run(input=tmp_path / "fifo", start_method=start_method, collect=True)
    given.join()
    given.close()
    os.close(reader)

    assert (through.results, named.results) == ([5], [5])


def same(i: int) -> int:
    return i


def test_a_failed_run_can_be_pickled_with_its_report() -> None:
    pipeline = ints(1)

    @pipeline.consumer
    def work(i: int) -> None:
        raise ValueError("no")

    with pytest.raises(JobsFailed) as caught:
        pipeline.run(backend="inline")

    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.report) == (str(caught.value), caught.value.report)
    assert [str(error) for error in again.exceptions] == ["no"]


def test_a_stage_named_like_the_one_that_reads_the_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text("1\n")
    pipeline = Pipeline("named")

    @pipeline.consumer(name="input")
    def take(i: int) -> int:
        return i

    with pytest.raises(PipelineError, match="reads --input"):
        pipeline.run(input=tmp_path / "items.jsonl", backend="inline")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"workers": 0},
            ["workers=0: Input should be greater than or equal to 1, or "],
        ),
        ({"workers": {"take": 0, "rest": 2}}, ["workers.take=0: Input should be greater"]),
        ({"workers": {"a": "x", "b": 0}}, ["workers.a='x'", "workers.b=0"]),
        ({"workers": {3: 1}}, ["workers.3=3: Input should be a valid string"]),
        ({"timeout": -1, "max_failures": 0}, ["max_failures=0", "timeout=-1"]),
    ],
)
def test_each_wrong_option_is_told_once(given: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(PipelineError) as caught:
        ints(1).run(**given)

    assert len(caught.value.problems) == len(told)
    for problem, text in zip(sorted(caught.value.problems), told, strict=True):
        assert problem.startswith(f"run option {text}")


def test_a_stage_s_wrong_option_is_told_once() -> None:
    with pytest.raises(PipelineError) as caught:
        ints(1).consumer(workers="many", nonsense=1)(print)

    unknown, wrong = sorted(caught.value.problems)
    assert "option workers='many': " in wrong
    assert wrong.endswith(", or Input should be 'auto'.")
    assert "has no option 'nonsense'" in unknown


@pytest.mark.parametrize(
    ("kind", "wrong", "meant", "has"),
    [
        ("consumer", "wrokers", "workers", "name, ordered, params, queue_bytes, queue_size"),
        ("consumer", "sorce", "source", "retry_on, source, timeout"),
        ("producer", "wrokers", "workers", "it has name, params, workers."),
        ("resource", "scop", "scope", "it has name, scope."),
    ],
)
def test_an_option_of_a_declaration_that_is_misspelt_is_told_with_what_was_meant(
    kind: str, wrong: str, meant: str, has: str
) -> None:
    declare = getattr(Pipeline("test"), kind)

    with pytest.raises(PipelineError) as caught:
        declare(**{wrong: 3})(print)

    assert f"has no option {wrong!r} (did you mean {meant!r}?)" in str(caught.value)
    assert has in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("collcet", "the run option 'collect'"), ("worker", "the run option 'workers'"), ("cuont", "'count'")],
)
def test_a_keyword_of_a_run_that_is_misspelt_is_told_with_what_was_meant(wrong: str, meant: str) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def numbers(count: int = 3) -> Iterator[int]:
        yield from range(count)

    told = rf"nothing takes a parameter '{wrong}' \(did you mean {meant}\?\); there are count\."
    with pytest.raises(PipelineError, match=told):
        pipeline.run(**{wrong: 1})


def test_a_default_of_a_run_that_is_no_option_is_told_with_what_was_meant() -> None:
    with pytest.raises(
        PipelineError, match=r"no run option 'wrokers' \(did you mean 'workers'\?\); there are "
    ):
        Pipeline("test", wrokers=3)
    with pytest.raises(PipelineError, match="run option 'journal' is not built yet"):
        Pipeline("test", journal="x.db")
