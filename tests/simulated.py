"""Pipelines for the simulation: each has what some part of the scheduler is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jobq import Job, Pipeline, Shard, Skip

# ── plain ────────────────────────────────────────────────────────────────────

plain = Pipeline("plain")


@plain.producer
def numbers(count: int = 50) -> Iterator[int]:
    yield from range(count)


@plain.consumer(workers=2, max_retries=2)
def spelled(number: int) -> str:
    return str(number)


@plain.consumer(workers=2, concurrency=2)
def measured(text: str) -> float:
    return float(text)


# ── ordered, with a small queue behind it, filtering and failing ─────────────

ordered = Pipeline("ordered")


@ordered.producer
def lines(count: int = 25) -> Iterator[int]:
    yield from range(count)


@ordered.consumer(workers=3, ordered=True, max_retries=2, queue_size=6)
def parsed(number: int) -> str | None:
    if number % 11 == 5:
        raise ValueError("never")
    return None if number % 7 == 3 else str(number)


@ordered.consumer(queue_size=2)
def written(text: str) -> float:
    return float(text)


@ordered.consumer(workers=2, ordered=True)
def doubled(number: float) -> Iterator[bytes]:
    yield f"{number}".encode()
    yield f"{2 * number}".encode()


# ── batches ──────────────────────────────────────────────────────────────────

batches = Pipeline("batches")


@batches.producer
def rows(count: int = 30) -> Iterator[int]:
    yield from range(count)


@batches.consumer(workers=2, batch=4, batch_timeout=0.01, max_retries=1)
def summed(numbers: list[int]) -> str:
    return str(sum(numbers))


@batches.consumer(batch=3, queue_size=5)
def stored(texts: list[str]) -> float:
    return float(len(texts))


# ── a loop, with keys ────────────────────────────────────────────────────────

loop = Pipeline("loop")


@dataclass(frozen=True)
class Url:
    number: int


@dataclass(frozen=True)
class Page:
    number: int


@loop.producer
def roots() -> Iterator[Url]:
    yield Url(1)
    yield Url(2)


@loop.consumer(workers=2, key=lambda url: str(url.number), source=["roots", "links"], max_retries=1)
def fetch(url: Url) -> Page:
    return Page(url.number)


@loop.consumer(workers=2)
def links(page: Page) -> Iterator[Url]:
    for number in (2 * page.number, 2 * page.number + 1, page.number + 3):
        if number < 18:
            yield Url(number)


# ── fan-out, fan-in, two producers, one of which is sharded; lanes; limits ───

wide = Pipeline("wide")


@wide.producer(workers=2)
def left(shard: Shard, count: int = 10) -> Iterator[int]:
    yield from range(shard.index, count, shard.count)


@wide.producer
def right(job: Job, count: int = 8) -> Iterator[int]:
    for number in range(100, 100 + count):
        if job.stopping:
            return
        yield number


@wide.consumer(workers=2, concurrency=3, source=["left", "right"], queue_size=4, max_deliveries=2)
def halved(number: int) -> float:
    if number % 9 == 2:
        raise Skip("odd one")
    return number / 2


@wide.consumer(
    workers=2, source=["left", "right"], max_retries=3, min_backoff=0.5, timeout=0.5, max_tasks_per_worker=3
)
def named(number: int, job: Job) -> str:
    return f"{number}/{job.attempt}"


@wide.consumer(source=halved, queue_size=3, rate=200)
def rounded(number: float) -> bytes:
    return bytes(int(number))


# ── many small stages in a row, one worker each, tiny queues ─────────────────

narrow = Pipeline("narrow")


@narrow.producer
def first(count: int = 12) -> Iterator[int]:
    yield from range(count)


@narrow.consumer(queue_size=1)
def second(number: int) -> str | float:
    return str(number) if number % 2 else float(number)


@narrow.consumer(queue_size=1, workers=2)
def third(text: str) -> bytes:
    return text.encode()


@narrow.consumer(queue_size=1)
def fourth(number: float) -> bytes:
    return str(number).encode()


@narrow.consumer(queue_size=1, source=["third", "fourth"], ordered=True)
def fifth(data: bytes) -> list[int]:
    return list(data)


# ── streams that travel in parts, if `jobq.work.HELD_OUTPUTS` is small ────────

streams = Pipeline("streams")


@streams.producer
def texts(count: int = 6) -> Iterator[int]:
    yield from range(count)


@streams.consumer(workers=2, max_retries=2, ordered=True)
def words(number: int) -> Iterator[str]:
    for place in range(7):
        yield f"{number}-{place}"


@streams.consumer(workers=2, max_retries=1)
def letters(word: str) -> Iterator[float]:
    yield from map(float, word.split("-"))
    yield 0.5
    yield 0.25


@streams.consumer(workers=2, concurrency=2, batch=5, batch_timeout=0.01, rate=500)
def counted(numbers: list[float]) -> bytes:
    return bytes(len(numbers))


ALL = (plain, ordered, batches, loop, wide, narrow, streams)
