"""
The workloads: their items, the work, and the number that is read.

Items are all different objects that share no strings, since pickle writes what is shared only once, which
would flatter whoever pickles many items together. Those that take time to make are made before the clock
starts.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from heapq import heapreplace
from math import isclose
from statistics import median
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from benchmarks.contestant import AT_ONCE, Contestant, Load

WORKERS = 2
#: W3's CPU seconds an item; W9's seconds of waiting; W10's seconds, fast and slow.
CPU = 0.001
WAIT = 0.02
FAST, SLOW = 0.00004, 0.04
SIZE = 4 << 20


class Wrong(Exception):
    """The contestant lost, doubled or changed something; the message says what."""


# --- items and work


def numbers(count: int) -> Iterator[int]:
    """Give 0, 1, 2, …"""
    yield from range(count)


def nothing(_number: int) -> None:
    """Do nothing: what is measured is the way here."""


def same(number: int) -> int:
    """Return the item: the next stage's."""
    return number


@dataclass
class Row:
    """About 200 bytes when pickled."""

    id: int
    name: str
    city: str
    url: str
    text: str


class Model(BaseModel):
    """The same."""

    id: int
    name: str
    city: str
    url: str
    text: str


def fields(number: int) -> dict[str, int | str]:
    """Return an item's fields; no other has an equal string."""
    return {
        "id": number,
        "name": f"name of the item {number:08}",
        "city": f"city {number:08}",
        "url": f"https://example.org/items/{number:08}",
        "text": f"{number:08} is what the text of this item begins with",
    }


@cache
def made(kind: Callable[..., Any], count: int) -> list[Any]:
    """Return that many items of a kind; made once, and inherited by what is forked afterwards."""
    return [kind(**fields(number)) for number in range(count)]


def dicts(count: int) -> Iterator[dict[str, int | str]]:
    """Give dicts."""
    yield from made(dict, count)


def rows(count: int) -> Iterator[Row]:
    """Give dataclass instances."""
    yield from made(Row, count)


def models(count: int) -> Iterator[Model]:
    """Give pydantic models."""
    yield from made(Model, count)


def echo_dict(item: dict[str, int | str]) -> dict[str, int | str]:
    """Return the item."""
    return item


def echo_row(item: Row) -> Row:
    """Return the item."""
    return item


def echo_model(item: Model) -> Model:
    """Return the item."""
    return item


def burn(number: int) -> int:
    """Use a millisecond of this thread's CPU time, whoever else wants the core."""
    until = time.thread_time() + CPU
    while time.thread_time() < until:
        pass
    return number


@cache
def buffers() -> list[Any]:
    """Return sixteen different arrays, stamped at both ends; a cache of a processor does not hold them."""
    arrays = [np.random.default_rng(number).integers(0, 255, SIZE, np.uint8) for number in range(16)]
    for number, array in enumerate(arrays):
        array[0] = array[-1] = number
    return arrays


@cache
def blocks() -> list[bytes]:
    """Return the same as bytes."""
    return [array.tobytes() for array in buffers()]


def arrays(count: int) -> Iterator[np.ndarray[Any, Any]]:
    """Give the arrays in turn."""
    for number in range(count):
        yield buffers()[number % 16]


def bytes_objects(count: int) -> Iterator[bytes]:
    """Give the bytes in turn."""
    for number in range(count):
        yield blocks()[number % 16]


def stamp_of_array(item: np.ndarray[Any, Any]) -> int:
    """Return the stamp; -1 if the two ends differ."""
    return int(item[0]) if len(item) == SIZE and item[0] == item[-1] else -1


def stamp_of_bytes(item: bytes) -> int:
    """Return the stamp; -1 if the two ends differ."""
    return item[0] if len(item) == SIZE and item[0] == item[-1] else -1


def wait(number: int) -> int:
    """Wait as for a network, holding the thread."""
    time.sleep(WAIT)
    return number


async def wait_async(number: int) -> int:
    """Wait as for a network."""
    await asyncio.sleep(WAIT)
    return number


@cache
def naps(order: str, count: int) -> list[float]:
    """Return each job's seconds, all different by nanoseconds: 1 in 100 is slow."""
    seconds = [FAST] * (count - count // 100) + [SLOW] * (count // 100)
    if order == "random":
        random.Random(1).shuffle(seconds)
    return [duration + number * 1e-10 for number, duration in enumerate(seconds)]


def naps_in_random_order(count: int) -> Iterator[float]:
    """Give seconds."""
    yield from naps("random", count)


def naps_slow_last(count: int) -> Iterator[float]:
    """Give seconds."""
    yield from naps("slow-last", count)


def nap(seconds: float) -> float:
    """Pass the time: by looking at the clock if it is short, since a short sleep takes longer than asked."""
    if seconds >= SLOW:
        time.sleep(seconds)
    else:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass
    return seconds


def ideal(seconds: Sequence[float]) -> float:
    """Return the makespan of greedy list scheduling: each job in turn goes to the first free worker."""
    free_at = [0.0] * WORKERS
    for duration in seconds:
        heapreplace(free_at, free_at[0] + duration)
    return max(free_at)


# --- what is read


@dataclass(frozen=True)
class Reading:
    """One measurement: the number in the workload's unit, and the seconds that it took."""

    value: float
    seconds: float


def check(load: Load, done: list[Any] | int) -> None:
    """Nothing is missing or twice; raises `Wrong` otherwise."""
    count = done if isinstance(done, int) else len(done)
    if count != load.count:
        raise Wrong(f"{count} of {load.count} came through")
    if isinstance(done, list):
        inside, outside = (sum(map(weight, items)) for items in (load.items(load.count), done))
        if not isclose(inside, outside, rel_tol=1e-15 * load.count):
            raise Wrong(f"the sum is {outside} instead of {inside}")


def weight(item: Any) -> Any:
    """Return a number by which to know the item."""
    if isinstance(item, dict):
        return item["id"]
    if isinstance(item, Row | Model):
        return item.id
    return item if isinstance(item, int | float) else int(item[0])


def timed(contestant: Contestant, load: Load) -> float:
    """Return the seconds of the whole call: workers are started and ended in it."""
    began = time.perf_counter()
    done = contestant.run(load)
    seconds = time.perf_counter() - began
    check(load, done)
    return seconds


def rate(contestant: Contestant, load: Load, unit: float = 1.0) -> Reading:
    """Read items a second, or what *unit* makes of them."""
    seconds = timed(contestant, load)
    return Reading(load.count * unit / seconds, seconds)


def share(contestant: Contestant, load: Load) -> Reading:
    """Read what part of the time the work itself would take, were nothing else to do."""
    seconds = timed(contestant, load)
    return Reading(load.count * CPU / WORKERS / seconds, seconds)


def latency(contestant: Contestant, load: Load) -> Reading:
    """Read the median microseconds from handing an item in to having its result, one at a time."""
    began = time.perf_counter()
    taken = []
    with contestant.caller(load.work) as call:
        for item in load.items(load.count):
            asked = time.perf_counter()
            if call(item) != item:
                raise Wrong(f"another result came for {item!r}")
            taken.append(time.perf_counter() - asked)
    return Reading(median(taken[len(taken) // 10 :]) * 1e6, time.perf_counter() - began)


def start(contestant: Contestant, load: Load) -> Reading:
    """Read the median milliseconds from nothing to one item done and everything stopped."""
    taken = []
    for item in load.items(load.count):
        began = time.perf_counter()
        with contestant.caller(load.work) as call:
            if call(item) != item:
                raise Wrong(f"another result came for {item!r}")
        taken.append(time.perf_counter() - began)
    return Reading(median(taken) * 1e3, sum(taken))


def stages(contestant: Contestant, load: Load) -> Reading:
    """Read items a second through three stages of one worker each."""
    began = time.perf_counter()
    done = contestant.stages(load, 3)
    seconds = time.perf_counter() - began
    check(load, done)
    return Reading(load.count / seconds, seconds)


def waiting(contestant: Contestant, load: Load) -> Reading:
    """Read the share of the ideal: every job waits, as many at once as may."""
    began = time.perf_counter()
    done = contestant.waiting(load)
    seconds = time.perf_counter() - began
    check(load, done)
    return Reading(-(-load.count // AT_ONCE) * WAIT / seconds, seconds)


def makespan(contestant: Contestant, load: Load) -> Reading:
    """Read how many times the ideal for the same order it takes."""
    seconds = timed(contestant, load)
    return Reading(seconds / ideal(list(load.items(load.count))), seconds)


def memory(contestant: Contestant, load: Load) -> Reading:
    """Read the seconds; whoever started this process watches the memory of it and its children meanwhile."""
    seconds = timed(contestant, load)
    return Reading(seconds, seconds)


# --- the registry


@dataclass(frozen=True)
class Workload:
    """
    What is asked, and what would be good.

    ``goal`` is jobq's: a bound of the value itself, or (``goal_of="raw"``) of its ratio to ``raw-joinable``.
    ``quick`` items in the quick mode; else as many as take the time asked for (``times`` as much), and at
    most ``most``; just these if not ``sized``. ``watched``: it is about memory over ``most`` items, so jobq
    gets all of them, however long it takes.
    """

    name: str
    title: str
    unit: str
    items: Callable[[int], Iterator[Any]]
    work: Callable[[Any], Any]
    read: Callable[[Contestant, Load], Reading]
    goal: float
    quick: int
    most: int
    goal_of: Literal["value", "raw"] = "value"
    better: Literal["more", "less"] = "more"
    sized: bool = True
    times: float = 1.0
    watched: bool = False
    results: bool = True

    def load(self, count: int, chunk: int = 0) -> Load:
        """Return *count* items and what to do with them."""
        return Load(self.name, self.items, self.work, count, self.results, chunk)


def _workloads() -> Iterator[Workload]:
    per_second = partial(Workload, unit="items/s", goal_of="raw")
    yield per_second(
        name="W1",
        title="tiny ints, the consumer does nothing",
        items=numbers,
        work=nothing,
        read=rate,
        goal=40,
        quick=5_000,
        most=20_000_000,
        results=False,
    )
    for kind, items, work in (
        ("dicts", dicts, echo_dict),
        ("dataclasses", rows, echo_row),
        ("models", models, echo_model),
    ):
        yield per_second(
            name=f"W2-{kind}",
            title=f"{kind} of 200 bytes, back to the caller",
            items=items,
            work=work,
            read=rate,
            goal=4,
            quick=2_000,
            most=150_000,
        )
    yield Workload(
        name="W3",
        title="1 ms of CPU an item",
        unit="share of the ideal",
        items=numbers,
        work=burn,
        read=share,
        goal=0.97,
        quick=100,
        most=2_000,
        sized=False,
    )
    for kind, big, stamp in (("arrays", arrays, stamp_of_array), ("bytes", bytes_objects, stamp_of_bytes)):
        yield Workload(
            name=f"W4-{kind}",
            title=f"4 MB {'numpy arrays' if kind == 'arrays' else 'bytes objects'}",
            unit="GB/s",
            items=big,
            work=stamp,
            read=partial(rate, unit=SIZE / 1e9),
            goal=10,
            quick=16,
            most=4_000,
        )
    yield Workload(
        name="W5",
        title="one item at a time, in to result",
        unit="us, median",
        items=numbers,
        work=same,
        read=latency,
        goal=1,
        goal_of="raw",
        better="less",
        quick=100,
        most=5_000,
    )
    yield per_second(
        name="W6",
        title="three stages of one worker each, ints",
        items=numbers,
        work=same,
        read=stages,
        goal=40,
        quick=3_000,
        most=10_000_000,
        results=False,
    )
    yield Workload(
        name="W7",
        title="start two workers, one item, clean stop",
        unit="ms, median",
        items=numbers,
        work=same,
        read=start,
        goal=1,
        goal_of="raw",
        better="less",
        quick=2,
        most=50,
    )
    yield Workload(
        name="W8",
        title="up to 10 million ints: how much a process grows after the first second, at most",
        unit="MB",
        items=numbers,
        work=nothing,
        read=memory,
        goal=4,
        better="less",
        quick=100_000,
        most=10_000_000,
        times=5,
        watched=True,
        results=False,
    )
    for kind, waits in (("threads", wait), ("async", wait_async)):
        yield Workload(
            name=f"W9-{kind}",
            title=f"500 jobs that wait 20 ms, 50 at once in one worker: {kind}",
            unit="share of the ideal",
            items=numbers,
            work=waits,
            read=waiting,
            goal=0.97,
            quick=100,
            most=500,
            sized=False,
        )
    for kind, order in (("random", naps_in_random_order), ("slow-last", naps_slow_last)):
        yield Workload(
            name=f"W10-{kind}",
            title=f"10,000 jobs, 1 in 100 a thousand times as long: {kind}",
            unit="x the ideal time",
            items=order,
            work=nap,
            read=makespan,
            goal=1.05,
            better="less",
            quick=1_000,
            most=10_000,
            sized=False,
        )


WORKLOADS = {workload.name: workload for workload in _workloads()}
