"""Resources that are async, where they are opened, and what they may ask for; on every backend."""

# ruff: noqa: ARG001  # jobs take items that they need not look at

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobq import Job, Pipeline, PipelineError, RunFailed, Shard
from tests.test_run import BACKENDS, Notes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


def where() -> tuple[int, int]:
    """Return the event loop and the thread in which this is called."""
    return id(asyncio.get_running_loop()), threading.get_ident()


def numbered(count: int) -> Pipeline:
    pipeline = Pipeline("test")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(count)

    return pipeline


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("batch", [None, 2])
def test_async_resources_live_in_the_event_loop_of_the_jobs(
    backend: str, concurrency: int, batch: int | None, notes: Notes
) -> None:
    pipeline = numbered(6)

    @pipeline.resource
    async def session() -> AsyncIterator[tuple[int, int]]:
        await asyncio.sleep(0)
        notes.add("opened")
        yield where()
        await asyncio.sleep(0)
        notes.add("closed")

    @pipeline.resource
    async def token(session: tuple[int, int]) -> tuple[int, int]:
        assert session == where()
        return where()

    @pipeline.resource
    def plain(token: tuple[int, int]) -> Iterator[tuple[int, int]]:
        assert token == where()
        yield where()
        notes.add("closed plain")

    if batch is None:

        @pipeline.consumer(concurrency=concurrency)
        async def work(i: int, plain: tuple[int, int], session: tuple[int, int]) -> bool:
            await asyncio.sleep(0)
            return plain == session == where()

    else:

        @pipeline.consumer(concurrency=concurrency, batch=batch, name="work")
        async def work_on_several(i: list[int], plain: tuple[int, int], session: tuple[int, int]) -> bool:
            return plain == session == where()

    report = pipeline.run(backend=backend, collect=True)

    assert report.results == [True] * (6 // (batch or 1))
    assert notes.lines() == ["opened", "closed plain", "closed"]


def test_a_producer_may_be_async_with_its_resources(backend: str, notes: Notes) -> None:
    pipeline = Pipeline("test")

    @pipeline.resource
    async def session() -> AsyncIterator[tuple[int, int]]:
        yield where()
        notes.add("closed")

    @pipeline.producer
    async def numbers(session: tuple[int, int]) -> AsyncIterator[bool]:
        yield session == where()

    @pipeline.consumer
    def work(i: bool) -> bool:
        return i

    assert pipeline.run(backend=backend, collect=True).results == [True]
    assert notes.lines() == ["closed"]


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("error", [SystemExit, ValueError, asyncio.CancelledError])
def test_an_async_resource_that_can_not_be_opened_ends_the_run(
    backend: str, concurrency: int, error: type[BaseException]
) -> None:
    pipeline = numbered(3)

    @pipeline.resource
    async def session() -> int:
        raise error("not today")

    @pipeline.consumer(concurrency=concurrency)
    async def work(i: int, session: int) -> None: ...

    with pytest.raises(RunFailed, match=r"while opening the resource session\(\)"):
        pipeline.run(backend=backend)


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_resource_knows_the_stage_that_it_is_opened_for(backend: str, concurrency: int) -> None:
    pipeline = numbered(3)

    @pipeline.resource
    def place(job: Job) -> str:
        assert not job.stopping
        return f"{job.stage} {job.attempt}"

    @pipeline.consumer(concurrency=concurrency)
    def work(i: int, place: str, job: Job) -> tuple[str, str]:
        return place, job.stage

    assert pipeline.run(backend=backend, collect=True).results == [("work 1", "work")] * 3


def problems_of(pipeline: Pipeline) -> tuple[str, ...]:
    with pytest.raises(PipelineError) as caught:
        pipeline.check()
    return caught.value.problems


def test_a_stage_that_is_not_async_can_have_no_async_resource() -> None:
    pipeline = numbered(1)

    @pipeline.resource
    async def session() -> int:
        return 1

    @pipeline.resource
    def client(session: int) -> int:
        return session

    @pipeline.consumer
    def work(i: int, client: int) -> None: ...

    (problem,) = problems_of(pipeline)
    assert problem.startswith("work() (")
    assert "needs the async resource session() (" in problem


def test_what_a_resource_can_not_have_is_told() -> None:
    pipeline = numbered(1)

    @pipeline.resource(scope="run")
    async def session() -> int:
        return 1

    @pipeline.resource(scope="run")
    def shared(job: Job) -> Any: ...

    @pipeline.resource
    def part(shard: Shard) -> Any: ...

    @pipeline.consumer
    async def work(i: int, session: int, shared: Any, part: Any) -> None: ...

    told = " ".join(problems_of(pipeline))
    assert "session() (" in told and "one for the run can't be async" in told
    assert "shared() (" in told and "one for the run has no Job" in told
    assert "its shard is a Shard, which stages have" in told
