"""`jobq.map`: one function over many items."""

from __future__ import annotations

import asyncio
import functools
import itertools
import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

import jobq
from jobq import PayloadError, PipelineError, WorkerLost
from tests.test_deaths import die, until
from tests.test_run import BACKENDS, PROCESSES, Gate, Notes, Plain, Unpicklable

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


def square(x: int) -> int:
    return x * x


def close(results: Iterator[Any]) -> None:
    """Leave the loop over *results*."""
    cast("Generator[Any, None, None]", results).close()


def test_results_come_in_order(backend: str) -> None:
    assert list(jobq.map(square, range(3000), workers=2, backend=backend)) == [i * i for i in range(3000)]


def test_nothing_comes_of_nothing(backend: str) -> None:
    assert list(jobq.map(square, [], backend=backend)) == []


def test_unordered_results_all_come(backend: str) -> None:
    results = jobq.map(square, range(3000), workers=2, backend=backend, ordered=False)

    assert Counter(results) == Counter(i * i for i in range(3000))


@pytest.mark.parametrize("name", [*PROCESSES, "thread"])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "unordered"])
def test_a_slow_item_holds_up_the_others_only_where_order_is_asked_for(
    name: str, ordered: bool, gate: Gate, notes: Notes
) -> None:
    def work(i: int) -> int:
        if i == 0:
            gate.wait()
        else:
            notes.add(i)
        return i

    def open_when_others_are_through() -> None:
        until(lambda: len(notes.lines()) == 3)
        gate.open()

    results = jobq.map(work, range(4), workers=2, backend=name, ordered=ordered, start_method="fork")

    if ordered:
        opener = threading.Thread(target=open_when_others_are_through, daemon=True)
        opener.start()
        assert list(results) == [0, 1, 2, 3]
        opener.join()
    else:
        assert sorted(itertools.islice(results, 3)) == [1, 2, 3]
        gate.open()
        assert list(results) == [0]


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "unordered"])
def test_every_input_has_one_output_none_too(backend: str, ordered: bool) -> None:
    given = [None, 0, "", [], [1, 2], (3,), {"a": None}]

    results = list(jobq.map(lambda item: item, given, backend=backend, ordered=ordered))

    assert sorted(map(repr, results)) == sorted(map(repr, given))
    if ordered:
        assert results == given


def test_lambdas_closures_partials_builtins_and_methods_can_be_mapped(backend: str) -> None:
    factor = 3
    functions: list[tuple[Any, list[int]]] = [
        (lambda x: x * factor, [3, 6]),
        (functools.partial(operator.add, 10), [11, 12]),
        (abs, [1, 2]),
        ((5).__sub__, [4, 3]),
    ]
    for function, expected in functions:
        assert list(jobq.map(function, [1, 2], backend=backend)) == expected


def test_annotations_of_the_function_do_not_matter(backend: str) -> None:
    def wrong(x: str) -> bytes:
        return x * 2  # type: ignore[return-value]  # what is tested

    assert list(jobq.map(wrong, [1, 2], backend=backend)) == [2, 4]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_async_functions_can_be_mapped(backend: str, concurrency: int) -> None:
    async def later(x: int) -> int | None:
        await asyncio.sleep(0)
        return x * 2 if x else None

    results = list(jobq.map(later, range(50), backend=backend, concurrency=concurrency))

    assert results == [None, *range(2, 100, 2)]


@pytest.mark.parametrize("name", PROCESSES)
def test_named_functions_can_be_mapped_in_spawned_workers(name: str) -> None:
    assert list(jobq.map(square, [1, 2], backend=name, start_method="spawn")) == [1, 4]


@pytest.mark.parametrize("name", PROCESSES)
def test_lambdas_are_refused_where_they_cannot_be_found_by_name(name: str) -> None:
    with pytest.raises(PipelineError, match="start_method"):
        next(jobq.map(lambda x: x, [1], backend=name, start_method="spawn"))


def test_wrong_options_are_refused_at_the_call(backend: str) -> None:
    with pytest.raises(PipelineError, match="workers"):
        jobq.map(square, [1], workers=0, backend=backend)
    with pytest.raises(PipelineError, match="nonsense"):
        list(jobq.map(square, [1], nonsense=1, backend=backend))
    with pytest.raises(PipelineError, match=r"no batch=2: it calls square\(\) for each item"):
        jobq.map(square, [1], batch=2, backend=backend)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("n_jobs", "say by workers= how many"),
        ("max_workers", "say by workers= how many"),
        ("chunksize", "leave it out, the size of chunks adapts by itself"),
        ("wrokers", r"did you mean 'workers'\?\); it has those of a consumer and of a run: backend,"),
    ],
)
def test_an_option_that_there_is_not_is_told_at_once_with_what_there_is(wrong: str, told: str) -> None:
    options: dict[str, Any] = {wrong: 4}
    with pytest.raises(PipelineError, match=rf"jobq\.map has no option '{wrong}'.*{told}"):
        jobq.map(square, [1], **options)


def test_messages_say_where_the_function_is() -> None:
    with pytest.raises(PipelineError, match=r"square\(\) \(.*test_mapping\.py:\d+\): option rate=-1"):
        jobq.map(square, [1], rate=-1)


def test_nothing_starts_before_the_first_result_is_asked_for(backend: str) -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        read.append(1)
        yield 1

    before = threading.active_count()
    results = jobq.map(square, items(), backend=backend)

    assert (read, threading.active_count(), multiprocessing.active_children()) == ([], before, [])
    assert list(results) == [1]


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "unordered"])
def test_an_endless_input_is_read_ahead_within_bounds(backend: str, ordered: bool) -> None:
    latest = 0

    def endless() -> Iterator[int]:
        nonlocal latest
        while True:
            latest += 1
            yield latest

    results = jobq.map(square, endless(), backend=backend, ordered=ordered, workers=2)
    for count, _ in enumerate(itertools.islice(results, 3000)):
        assert latest <= count + 1001
    close(results)


def test_leaving_the_loop_stops_the_run_and_closes_the_input(backend: str) -> None:
    closed: list[bool] = []

    def endless() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    for result in jobq.map(square, endless(), backend=backend, workers=2):
        if result == 100:
            break

    assert closed == [True]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "unordered"])
def test_an_item_that_fails_raises_at_its_turn_and_ends_the_run(backend: str, ordered: bool) -> None:
    def work(i: int) -> int:
        if i == 13:
            raise Plain("thirteen")
        return i

    got: list[int] = []
    with pytest.raises(Plain, match="thirteen") as caught:
        for result in jobq.map(work, itertools.count(), backend=backend, ordered=ordered, workers=2):
            got.append(result)  # noqa: PERF402  # the loop raises

    if ordered:
        assert got == list(range(13))
    assert "in work" in str(caught.value.__cause__)


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "unordered"])
def test_what_an_item_raises_says_at_which_index_it_was(backend: str, ordered: bool) -> None:
    def work(text: str) -> int:
        return len(text) // (text != "c\n")

    with pytest.raises(ZeroDivisionError) as caught:
        list(jobq.map(work, ["a", "b", "c\n"], backend=backend, ordered=ordered))

    assert caught.value.__notes__ == [r"stage work, job 2, item 'c\n', at index 2 of the input"]


def test_an_input_that_raises_ends_the_run(backend: str) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise Plain("no more")

    with pytest.raises(Plain, match="no more"):
        list(jobq.map(square, items(), backend=backend))


@pytest.mark.parametrize("name", PROCESSES)
def test_what_cannot_be_pickled_raises(name: str) -> None:
    with pytest.raises(PayloadError, match="not me") as caught:
        list(jobq.map(square, [1, Unpicklable()], backend=name))
    assert caught.value.__notes__[0].endswith(", at index 1 of the input")
    with pytest.raises(PayloadError, match="not me"):
        list(jobq.map(lambda _: Unpicklable(), [1], backend=name))


@pytest.mark.parametrize("name", PROCESSES)
def test_a_worker_that_dies_is_replaced_and_an_item_that_kills_raises(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "died"

    def work(i: int) -> int:
        if i == 20 and not marker.exists():
            marker.touch()
            die()
        if i == 200:
            die()
        return i

    results = jobq.map(work, range(300), backend=name, workers=2)

    assert list(itertools.islice(results, 200)) == list(range(200))
    with pytest.raises(WorkerLost):
        next(results)


@pytest.mark.parametrize("name", PROCESSES)
def test_several_workers_share_the_items(name: str, notes: Notes) -> None:
    def pid(_: int) -> int:
        notes.add(os.getpid())
        until(lambda: len(set(notes.lines())) == 2)
        return os.getpid()

    assert len(set(jobq.map(pid, range(10), workers=2, backend=name))) == 2


def test_maps_can_be_nested(backend: str) -> None:
    outer = jobq.map(square, range(3), backend=backend, start_method="fork")
    pairs = [
        (a, list(jobq.map(square, range(a, a + 2), backend=backend, start_method="fork"))) for a in outer
    ]

    assert pairs == [(0, [0, 1]), (1, [1, 4]), (4, [16, 25])]


def test_the_one_liner_works_in_a_program(tmp_path: Path) -> None:
    script = tmp_path / "squares.py"
    script.write_text(
        "import jobq\n"
        "def square(x): return x * x\n"
        "if __name__ == '__main__':\n"
        "    for result in jobq.map(square, range(5), workers=2): print(result)\n"
    )

    told = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=30, check=True
    )

    assert (told.stdout.split(), told.stderr) == (["0", "1", "4", "9", "16"], "")


# --- what is read ahead --------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_items_are_as_they_were_when_they_were_read(name: str) -> None:
    def changing() -> Iterator[Any]:
        row: dict[str, Any] = {"n": -1}
        for number in range(600):
            row["n"] = number
            yield row if number % 3 else number  # scalars among them

    given = list(jobq.map(lambda item: item, changing(), backend=name))

    assert given == [{"n": n} if n % 3 else n for n in range(600)]


@pytest.mark.parametrize("ordered", [True, False])
def test_what_the_source_raises_comes_after_what_it_gave(backend: str, ordered: bool) -> None:
    def source() -> Iterator[int]:
        yield 10
        yield 11
        raise Plain("source")

    seen: list[int] = []
    with pytest.raises(Plain):
        seen.extend(jobq.map(square, source(), backend=backend, ordered=ordered))

    assert sorted(seen) == [100, 121]


def test_what_is_skipped_gives_none(backend: str) -> None:
    def odd(i: int) -> int:
        if i % 2 == 0:
            raise jobq.Skip("even")
        return i

    assert list(jobq.map(odd, range(6), backend=backend)) == [None, 1, None, 3, None, 5]


def test_a_key_is_refused() -> None:
    with pytest.raises(PipelineError, match="one output for each input"):
        jobq.map(square, [1], key=str)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_queue_of_one_is_enough(backend: str, ordered: bool) -> None:
    results = jobq.map(square, range(300), queue_size=1, workers=2, ordered=ordered, backend=backend)

    assert sorted(results) == [i * i for i in range(300)]


def test_large_items_and_results_come_through(backend: str) -> None:
    def shout(text: bytes) -> bytes:
        return text.upper()

    texts = [bytes([97 + i]) * 3_000_000 for i in range(12)]
    results = jobq.map(shout, texts, queue_bytes=4_000_000, workers=2, backend=backend)

    assert list(results) == [text.upper() for text in texts]


@pytest.mark.parametrize("name", [*PROCESSES, "thread"])
def test_an_item_does_not_wait_for_the_next_one(name: str, notes: Notes) -> None:
    def work(i: int) -> int:
        notes.add(i)
        return i

    def slow() -> Iterator[int]:
        yield 1
        until(lambda: notes.lines() == ["1"])  # it is done, though there is no other yet
        yield 2

    assert list(jobq.map(work, slow(), backend=name)) == [1, 2]


def test_what_comes_after_one_that_failed_is_not_given(backend: str) -> None:
    def work(i: int) -> int:
        if i == 57:
            raise ValueError(i)
        return i

    given: list[int] = []
    with pytest.raises(ValueError, match="57"):
        given.extend(jobq.map(work, range(500), workers=2, backend=backend))  # as far as it comes

    assert given == list(range(57))


@pytest.mark.parametrize("name", ["joinable", "thread"])
def test_ctrl_c_strikes_in_the_body_of_the_loop(name: str) -> None:
    before = signal.getsignal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        for _ in jobq.map(square, itertools.count(), backend=name):
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the body went on")

    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("options", [{}, {"fail_fast": True}])
def test_an_item_that_takes_too_long_raises(ordered: bool, options: dict[str, Any]) -> None:
    def forever(i: int) -> int:
        threading.Event().wait()
        return i

    with pytest.raises(jobq.TimeLimitExceeded):
        list(jobq.map(forever, range(3), timeout=0.3, ordered=ordered, **options))


def test_a_run_that_gives_up_is_told() -> None:
    pipeline = jobq.Pipeline("test")

    @pipeline.resource
    def broken() -> int:
        raise ConnectionError("no")

    @pipeline.consumer
    def work(i: int, broken: int) -> int:
        return i + broken

    with pytest.raises(jobq.RunFailed, match="no, while opening the resource broken"):
        list(pipeline.over(itertools.count(), ordered=False))


def test_nothing_is_given_beyond_an_item_that_has_no_result(backend: str) -> None:
    """Else they would go with other items: what an ordered stage held for one is let go at the end."""

    def work(i: int) -> int:
        if i == 0:
            raise jobq.Retry(delay=1000)
        if i == 2:
            raise jobq.Reject("two")
        return i

    given: list[int] = []
    with pytest.raises(jobq.Reject, match="two"):
        given.extend(jobq.map(work, range(10), workers=2, max_retries=1, max_failures=1, backend=backend))

    assert given == []


def test_on_inline_no_more_is_read_than_in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobq.feed.READ_SECONDS", 0.0)  # every source is slow
    read: list[int] = []

    def source() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    results = jobq.map(square, source(), backend="inline")
    assert [next(results), len(read) < 5] == [0, True]
    assert list(results) == [i * i for i in range(1, 100)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_on_inline_a_stop_signal_interrupts_the_map(number: int) -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for i in itertools.count():
            if i == 50:
                signal.raise_signal(number)
            read.append(i)
            yield i

    with pytest.raises(KeyboardInterrupt):
        for _ in jobq.map(square, source(), backend="inline"):
            assert len(read) < 5000

    assert 50 <= len(read) < 5000


class AsyncSquare:
    async def __call__(self, x: int) -> int:
        await asyncio.sleep(0)
        return x * x


def test_what_is_called_like_an_async_function_is_one(backend: str) -> None:
    assert list(jobq.map(AsyncSquare(), range(4), backend=backend)) == [0, 1, 4, 9]
