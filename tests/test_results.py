"""Where results go: those that are kept, and the garbage collector meanwhile."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from jobq import Pipeline
from jobq.driver import Driver
from jobq.results import LOOK_SECONDS, RESULTS_BYTES, RESULTS_SIZE, Collect, JsonLines, Seldom, Stream
from jobq.shapes import Keys
from jobq.wire import Block, PackedObjects, PackedRows, PackedScalars, PickleCodec, RowCodec


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    """See that the garbage collector is on afterwards."""
    assert gc.isenabled()
    yield
    assert gc.isenabled()


def rows(*numbers: int) -> Block:
    codec: Any = PickleCodec().shaped(Keys())
    assert isinstance(codec, RowCodec)
    return codec.block([codec.encode({"n": number}) for number in numbers])


def scalars(*numbers: int) -> Block:
    return PickleCodec().scalars(list(numbers))


def objects(*items: Any) -> Block:
    codec = PickleCodec()
    return codec.block([codec.encode(item) for item in items])


def collect(*blocks: Block) -> Collect:
    sink = Collect()
    sink.codec = PickleCodec()
    for block in blocks:
        sink.put("work", block)
    return sink


def catch_up(sink: Collect) -> int:
    """Load what may be loaded meanwhile; return how many blocks that were."""
    loaded = 0
    while sink.behind:
        sink.catch_up()
        loaded += 1
    sink.rest()
    return loaded


class Loud:
    """An item whose loading is noticed."""

    loaded = 0

    def __setstate__(self, state: object) -> None:
        Loud.loaded += 1

    def __getstate__(self) -> str:
        return "loud"


def test_what_runs_nobody_s_code_is_loaded_meanwhile_and_the_order_is_kept() -> None:
    first, second = rows(*range(20)), scalars(7, 8)
    assert isinstance(first, PackedRows)
    assert isinstance(second, PackedScalars)
    sink = collect(objects(Loud()), first, objects(Loud()), second)
    before = Loud.loaded

    assert catch_up(sink) == 2
    assert Loud.loaded == before

    results = sink.load_all()
    assert Loud.loaded == before + 2
    assert [type(result) for result in results] == [Loud, *[dict] * 20, Loud, int, int]
    assert results[1:21] == [{"n": number} for number in range(20)]


def test_what_comes_after_it_caught_up_is_loaded_too() -> None:
    sink = collect(rows(*range(10)))
    assert catch_up(sink) == 1

    sink.put("work", rows(*range(10, 20)))

    assert catch_up(sink) == 1
    assert sink.load_all() == [{"n": number} for number in range(20)]


def test_what_can_t_be_loaded_is_told_apart() -> None:
    broken = PackedObjects(b"no pickle", (9).to_bytes(8, "little"))

    sink = collect(scalars(1), broken, scalars(2))

    assert catch_up(sink) == 2
    assert sink.load_all() == [1, 2]
    assert len(sink.unloadable) == 1


def test_results_that_wait_are_bounded_in_bytes_too() -> None:
    stream = Stream()
    stream.put("work", objects(1))
    assert stream.room == RESULTS_SIZE - 1

    stream.put("work", objects(bytes(RESULTS_BYTES)))
    assert stream.room == 0

    assert [stream.poll() is not None for _ in range(2)] == [True, True]
    assert stream.room == RESULTS_SIZE


def test_lines_that_wait_are_bounded_in_bytes_too() -> None:
    reader, writer = os.pipe()
    try:
        lines = JsonLines(writer)
        lines.put("work", objects(bytes(RESULTS_BYTES)))
        assert lines.room < RESULTS_SIZE
        while lines.waitable is not None:
            os.read(reader, 1 << 20)
            lines.flush()
            assert lines.room in (0, RESULTS_SIZE - 1, RESULTS_SIZE)
        assert lines.room == RESULTS_SIZE
    finally:
        os.close(reader)
        os.close(writer)


def test_the_collector_looks_for_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    time = [100.0]
    looks: list[float] = []

    def look() -> int:
        looks.append(time[0])
        time[0] += 0.5
        return 0

    monkeypatch.setattr(gc, "collect", look)
    seldom = Seldom(lambda: time[0])
    seldom.begin()
    assert not gc.isenabled()

    for _ in range(300):
        seldom.look()
        time[0] += 0.1
    seldom.end()

    assert looks[0] == pytest.approx(100 + LOOK_SECONDS, abs=0.11)
    assert [later - earlier for earlier, later in pairwise(looks)] == [pytest.approx(10.5, abs=0.11)] * (
        len(looks) - 1
    )
    assert len(looks) == 3


def test_a_collector_that_the_program_switched_off_stays_off() -> None:
    gc.disable()
    try:
        seldom = Seldom()
        seldom.begin()
        assert not seldom.is_on
        seldom.end()
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_the_collector_as_it_was(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline("ints")
    step = Driver.step
    was_off: list[int] = []

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(3000)

    @pipeline.consumer
    def work(number: int) -> dict[str, int]:
        return {"n": number}

    def watched(driver: Driver) -> bool:
        ended = step(driver)
        if not gc.isenabled():
            was_off.append(1)
            if fails:
                raise ValueError("no more")
        return ended

    monkeypatch.setattr(Driver, "step", watched)

    if fails:
        with pytest.raises(ValueError, match="no more"):
            pipeline.run(collect=True)
    else:
        report = pipeline.run(collect=True)
        assert sorted(result["n"] for result in report.results) == list(range(3000))
    assert was_off
