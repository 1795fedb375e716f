"""What a worker makes of an order, against a port that is a list: by reference and by pickle."""

# ruff: noqa: ARG001  # jobs take items, resources and jobs that they need not look at

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from jobq import Job, Reject, Retry, Shard, Skip, outbox
from jobq.annotations import read_signature
from jobq.backend import DECODING, HINT, IDLE, LANES, LIMIT, STOPPING, Page, blank_page, page_words, past
from jobq.outbox import Flusher
from jobq.stage import ConsumerOptions, ProducerOptions, Resource, Stage, locate
from jobq.wire import (
    CHUNK_BYTES,
    Answer,
    Chunk,
    Codec,
    Grant,
    Order,
    Part,
    PickleCodec,
    ReferenceCodec,
    pack,
    unpack,
)
from jobq.work import SLICE_SECONDS, ResourceUse, RouteUse, StageRecipe

CODECS: dict[str, Codec] = {"reference": ReferenceCodec(), "pickle": PickleCodec()}


class FakePort:
    """Keeps what is sent; as frames, where items are pickled."""

    def __init__(self, codec: Codec, lanes: int = 1) -> None:
        self.codec = codec
        self.page: Page = [0] * page_words(lanes)
        blank_page(self.page)
        self.answers: list[Answer] = []
        self.whole = threading.Event()
        self.watch: Callable[[Answer], None] = lambda _: None

    def receive(self) -> Order:
        raise AssertionError("nobody asks a fake port for orders")

    def send(self, answer: Answer) -> None:
        self.watch(answer)
        if isinstance(self.codec, PickleCodec):
            answer = unpack(b"".join(pack(answer)))  # type: ignore[assignment]  # an answer comes back
        self.answers.append(answer)
        if answer.final:
            self.whole.set()


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> Codec:
    return CODECS[request.param]


@pytest.fixture
def pickled() -> Codec:
    return CODECS["pickle"]


class Bench:
    """One worker's work, with a fake port."""

    def __init__(
        self,
        function: Callable[..., Any],
        codec: Codec,
        *,
        kind: str = "consumer",
        lanes: int = 1,
        routes: tuple[RouteUse, ...] | None = None,
        member_routes: tuple[int, ...] | None = None,
        resources: tuple[Callable[..., Any], ...] = (),
        flusher: bool = False,
        shard: Shard | None = None,
        values: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        model = ProducerOptions(**options) if kind == "producer" else ConsumerOptions(**options)
        stage = Stage(
            "work", "producer" if kind == "producer" else "consumer", function, model, (), locate(function)
        )
        signature = read_signature(stage)
        assert not signature.problems
        given = len(signature.outputs)
        uses = tuple(
            ResourceUse(resource, read_signature(resource), {})
            for resource in (Resource(one.__name__, one) for one in resources)
        )
        recipe = StageRecipe(
            "r1",
            stage,
            signature,
            routes if routes is not None else (RouteUse("items"),) * min(given, 1),
            member_routes if member_routes is not None else (0,) * given,
            values or {},
            uses,
            shard or Shard(0, 1),
            lanes,
            flusher or lanes > 1,
        )
        self.port = FakePort(codec, lanes)
        self.work = recipe.open(self.port)
        self.sent = 0

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.work.close()

    def chunk(self, *items: Any, keys: tuple[str, ...] | None = None, attempt: int = 1) -> Chunk:
        codec = self.port.codec
        part = Part(40 + self.sent, codec.block([codec.encode(item) for item in items]), attempt, 1, keys)
        return Chunk(self.sent, (part,), len(items))

    def do(self, *items: Any, **given: Any) -> list[Answer]:
        """Run one chunk of *items*; return its answers, the last of them final."""
        self.port.answers.clear()
        self.port.whole.clear()
        chunk = self.chunk(*items, **given)
        self.work.run(chunk)
        self.sent += chunk.count
        assert self.port.whole.wait(20)
        answers = list(self.port.answers)
        assert [answer.final for answer in answers] == [False] * (len(answers) - 1) + [True]
        assert {answer.number for answer in answers} == {chunk.number}
        return answers

    def grant(self, count: int, nbytes: int = 1 << 30) -> Answer:
        """Let a producer give; return its last answer, with the outputs of all."""
        self.port.answers.clear()
        self.work.run(Grant(self.sent, count, nbytes))
        self.sent += count
        return self.port.answers[-1]

    def given(self, route: int = 0) -> list[Any]:
        """Return the items that the answers since the last order hold."""
        return [
            item
            for answer in self.port.answers
            for output in answer.outputs
            if output.route == route
            for item in self.port.codec.decode(output.block)
        ]

    def parents(self, route: int = 0) -> list[int]:
        """Return the index of the job that gave each item."""
        found: list[int] = []
        for answer in self.port.answers:
            for output in answer.outputs:
                if output.route == route:
                    indices = output.parent_indices()
                    found += settled(answer) if indices is None else indices
        return found


def settled(*answers: Answer) -> list[int]:
    return [i for answer in answers for low, high in answer.settled for i in range(low, high)]


@dataclass
class Box:
    content: Any


class Unpicklable:
    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("not me")


class Unloadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


# --- one job after the other ---------------------------------------------------------------------


def square(i: int) -> int:
    return i * i


def box(i: int) -> Box:
    return Box(i)


def refuse_odd(i: int) -> Box:
    if i % 2:
        raise ValueError(f"odd {i}")
    return Box(i)


@pytest.mark.parametrize("function", [square, box])
def test_every_job_is_settled_and_gives_its_output_in_order(
    function: Callable[..., Any], codec: Codec
) -> None:
    with Bench(function, codec) as bench:
        answers = bench.do(1, 2, 3)

        assert settled(*answers) == [0, 1, 2]
        assert bench.given() == [function(i) for i in (1, 2, 3)]
        assert bench.parents() == [0, 1, 2]
        assert (answers[-1].totals.done, answers[-1].totals.emitted) == (3, (3,))


def test_totals_count_from_the_worker_s_beginning(codec: Codec) -> None:
    with Bench(refuse_odd, codec) as bench:
        bench.do(0, 1, 2)
        (*_, last) = bench.do(3, 4)

        assert (last.totals.done, last.totals.failed, last.totals.emitted) == (3, 2, (3,))


def test_failures_say_which_job_what_where_and_its_item(codec: Codec) -> None:
    with Bench(refuse_odd, codec) as bench:
        answers = bench.do(0, 1, 2, 3)

        assert settled(*answers) == [0, 2]
        assert (bench.given(), bench.parents()) == ([Box(0), Box(2)], [0, 2])
        failures = [failure for answer in answers for failure in answer.failures]
        assert [(one.index, one.verdict, one.error, one.message) for one in failures] == [
            (1, "error", "ValueError", "odd 1"),
            (3, "error", "ValueError", "odd 3"),
        ]
        assert all("refuse_odd" in one.traceback and one.retriable for one in failures)
        first = failures[0]
        assert (first.item_type, first.item_json, first.item_repr) == ("int", "1", "1")
        assert isinstance(pickle.loads(first.exception or b""), ValueError)


def test_jobq_s_own_frames_are_not_in_a_traceback(codec: Codec) -> None:
    with Bench(refuse_odd, codec) as bench:
        (answer,) = bench.do(1)

        assert "jobq/work.py" not in answer.failures[0].traceback


@pytest.mark.parametrize(
    ("error", "verdict", "delay"),
    [
        (Retry(), "retry", None),
        (Retry(delay=2.5), "retry", 2.5),
        (Reject("why"), "reject", None),
        (ValueError(), "error", None),
        (SystemExit(), "error", None),
        (KeyboardInterrupt(), "error", None),
        (GeneratorExit(), "error", None),
        (StopIteration(), "error", None),
    ],
    ids=repr,
)
def test_what_a_job_raises_is_its_own_affair(
    error: BaseException, verdict: str, delay: float | None, codec: Codec
) -> None:
    def work(i: int) -> int:
        if i == 1:
            raise error
        return i

    with Bench(work, codec) as bench:
        answers = bench.do(0, 1, 2)

        (failure,) = [failure for answer in answers for failure in answer.failures]
        assert (failure.index, failure.verdict, failure.delay) == (1, verdict, delay)
        assert failure.retriable is isinstance(error, Exception)
        assert bench.given() == [0, 2]


def test_none_where_it_is_declared_and_skip_anywhere_filter_a_job(codec: Codec) -> None:
    def even(i: int) -> int | None:
        if i == 4:
            raise Skip("four")
        return None if i % 2 else i

    with Bench(even, codec) as bench:
        answers = bench.do(0, 1, 2, 3, 4, 5, 6)

        assert settled(*answers) == list(range(7))
        assert [index for answer in answers for index in answer.filtered] == [1, 3, 4, 5]
        assert (bench.given(), bench.parents()) == ([0, 2, 6], [0, 2, 6])
        assert (answers[-1].totals.done, answers[-1].totals.filtered) == (3, 4)


def test_a_stage_that_gives_nothing_settles_without_outputs(codec: Codec) -> None:
    seen = []

    def end(i: int) -> None:
        seen.append(i)

    with Bench(end, codec) as bench:
        answers = bench.do(1, 2)

        assert (seen, settled(*answers), bench.given()) == ([1, 2], [0, 1], [])


def test_results_that_nobody_wants_are_counted_and_not_pickled(pickled: Codec) -> None:
    def give(i: int) -> Unpicklable:
        return Unpicklable()

    with Bench(give, pickled, routes=(RouteUse("count"),)) as bench:
        answers = bench.do(1, 2)

        assert answers[-1].totals.emitted == (2,)
        assert sum(output.block.count for answer in answers for output in answer.outputs) == 2


def test_results_as_json_are_lines_of_text(codec: Codec) -> None:
    with Bench(box, codec, routes=(RouteUse("json"),)) as bench:
        (answer,) = bench.do(1, 2)

        (output,) = answer.outputs
        assert bytes(output.block.body) == b'{"content":1}\n{"content":2}\n'  # type: ignore[attr-defined]


def test_a_result_without_a_json_form_is_its_job_s_failure(codec: Codec) -> None:
    def give(i: int) -> Box:
        return Box(object() if i == 1 else i)

    with Bench(give, codec, routes=(RouteUse("json"),)) as bench:
        answers = bench.do(0, 1, 2)

        (failure,) = [failure for answer in answers for failure in answer.failures]
        assert (failure.index, failure.verdict, failure.error) == (1, "payload", "PayloadError")
        assert "JSON" in failure.message


# --- unions and keys -----------------------------------------------------------------------------


def sort(i: int) -> int | str:
    return i if i % 2 else str(i)


def test_what_jobs_of_two_routes_gave_is_theirs_in_every_answer(codec: Codec) -> None:
    def give(i: int) -> int | str:
        if i == 2:
            bench.work.flush()  # type: ignore[attr-defined]  # as the flusher may at any moment
        return str(i) if i % 2 else i

    with Bench(give, codec, routes=(RouteUse("items"),) * 2, member_routes=(0, 1)) as bench:
        answers = bench.do(0, 1, 2, 3, 4, 5)

        assert len(answers) == 2
        assert (bench.given(0), bench.parents(0)) == ([0, 2, 4], [0, 2, 4])
        assert (bench.given(1), bench.parents(1)) == (["1", "3", "5"], [1, 3, 5])


def test_an_item_of_a_union_takes_the_route_of_its_type(codec: Codec) -> None:
    with Bench(sort, codec, routes=(RouteUse("items"),) * 2, member_routes=(0, 1)) as bench:
        answers = bench.do(1, 2, 3, 4)

        assert (bench.given(0), bench.parents(0)) == ([1, 3], [0, 2])
        assert (bench.given(1), bench.parents(1)) == (["2", "4"], [1, 3])
        assert answers[-1].totals.emitted == (2, 2)


def test_what_is_no_member_of_the_union_is_its_job_s_failure(codec: Codec) -> None:
    def give(i: int) -> int | str:
        return 1.5 if i == 1 else i  # type: ignore[return-value]  # the error under test

    with Bench(give, codec, routes=(RouteUse("items"),) * 2, member_routes=(0, 1)) as bench:
        answers = bench.do(0, 1, 2)

        (failure,) = [failure for answer in answers for failure in answer.failures]
        assert (failure.index, failure.verdict) == (1, "payload")
        assert all(word in failure.message for word in ("float", "int", "str", "work()"))
        assert bench.given() == [0, 2]


def test_keys_are_computed_where_the_item_is(codec: Codec) -> None:
    keys = {0: "zero", 2: 2}
    with Bench(square, codec, routes=(RouteUse("items", ((1, lambda i: keys[i]),)),)) as bench:
        (answer,) = bench.do(0, 1)

        ((place, (first, second)),) = answer.outputs[0].keys
        assert (place, first) == (1, "zero")
        assert second[0] == "!"
        assert "KeyError" in second[1]


# --- what arrives --------------------------------------------------------------------------------


def test_an_item_of_the_wrong_type_is_refused_and_its_job_does_not_begin(codec: Codec) -> None:
    begun = []

    def work(i: int) -> int:
        begun.append(i)
        return i

    with Bench(work, codec) as bench:
        answers = bench.do(1, "two", 3)

        (failure,) = [failure for answer in answers for failure in answer.failures]
        assert (failure.index, failure.verdict, failure.error, failure.item_json) == (
            1, "payload", "PayloadError", '"two"',
        )  # fmt: skip
        assert "work() takes int" in failure.message
        assert begun == [1, 3]


def test_an_item_that_can_not_be_loaded_is_refused_and_the_others_are_done(pickled: Codec) -> None:
    def work(thing: object) -> int:
        return 1

    with Bench(work, pickled) as bench:
        answers = bench.do(1, Unloadable(), 3)

        (failure,) = [failure for answer in answers for failure in answer.failures]
        assert (failure.index, failure.verdict) == (1, "payload")
        assert "could not be loaded" in failure.message
        assert settled(*answers) == [0, 2]


def test_while_items_are_loaded_the_page_says_so(pickled: Codec) -> None:
    pages: list[Page] = []

    class Looks:
        def __reduce__(self) -> tuple[Any, ...]:
            return eval, ("__import__('tests.test_work', fromlist=['x']).look()",)

    global look  # noqa: PLW0603  # found by name when the item is loaded

    def look() -> int:
        pages.append(list(bench.port.page))
        return 1

    def work(thing: object) -> None: ...

    with Bench(work, pickled) as bench:
        bench.do(1, 2)
        bench.do(Looks())

        assert pages[0][DECODING] == 2
        assert bench.port.page[DECODING] == IDLE


look: Callable[[], int]


# --- many outputs --------------------------------------------------------------------------------


def repeat(i: int) -> Iterator[int]:
    yield from range(i)


def boxes(i: int) -> Iterator[Box]:
    yield from map(Box, range(i))


@pytest.mark.parametrize("function", [repeat, boxes])
def test_a_job_s_outputs_leave_with_its_end(function: Callable[..., Any], codec: Codec) -> None:
    with Bench(function, codec) as bench:
        answers = bench.do(2, 0, 3)

        assert settled(*answers) == [0, 1, 2]
        assert bench.given() == [*function(2), *function(3)]
        assert bench.parents() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("function", [repeat, boxes])
@pytest.mark.parametrize("many", [1000, 1001, 2500])
def test_a_long_stream_travels_in_parts_that_count_as_they_come(
    function: Callable[..., Any], many: int, codec: Codec
) -> None:
    with Bench(function, codec) as bench:
        answers = bench.do(1, many, 2)

        assert bench.given() == [*function(1), *function(many), *function(2)]
        assert bench.parents() == [0, *[1] * many, 2, 2]
        assert settled(*answers) == [0, 1, 2]
        assert (len(answers) > 1) is (many > 1000)
        assert answers[-1].totals.emitted == (many + 3,)


def test_outputs_of_a_job_that_fails_are_dropped(codec: Codec) -> None:
    def some(i: int) -> Iterator[int]:
        yield i
        if i == 1:
            raise ValueError

    with Bench(some, codec) as bench:
        answers = bench.do(0, 1, 2)

        assert (bench.given(), bench.parents(), settled(*answers)) == ([0, 2], [0, 2], [0, 2])


def test_a_generator_is_closed_when_one_of_its_outputs_can_not_travel(pickled: Codec) -> None:
    closed = []

    def some(i: int) -> Iterator[object]:
        try:
            yield Unpicklable()
        finally:
            closed.append(i)

    with Bench(some, pickled) as bench:
        (answer,) = bench.do(1)

        assert closed == [1]
        assert answer.failures[0].verdict == "payload"


def test_a_list_may_be_returned_where_an_iterator_is_declared(codec: Codec) -> None:
    def some(i: int) -> Iterator[int]:
        return [i, i]  # type: ignore[return-value]  # allowed

    with Bench(some, codec) as bench:
        bench.do(1, 2)

        assert (bench.given(), bench.parents()) == ([1, 1, 2, 2], [0, 0, 1, 1])


def test_async_functions_and_generators_are_run(codec: Codec) -> None:
    async def double(i: int) -> int:
        await asyncio.sleep(0)
        return 2 * i

    async def twice(i: int) -> AsyncIterator[int]:
        yield i
        await asyncio.sleep(0)
        yield i

    with Bench(double, codec) as bench:
        bench.do(1, 2)
        assert bench.given() == [2, 4]
    with Bench(twice, codec) as bench:
        bench.do(1, 2)
        assert (bench.given(), bench.parents()) == ([1, 1, 2, 2], [0, 0, 1, 1])


# --- what can't travel, and what is changed later ------------------------------------------------


def unpicklable_for_one(i: int) -> int:
    return Unpicklable() if i == 1 else i  # type: ignore[return-value]  # the error under test


def unpicklable_for_one_too(i: int) -> object:
    return Unpicklable() if i == 1 else i


@pytest.mark.parametrize("function", [unpicklable_for_one, unpicklable_for_one_too])
def test_what_can_not_be_pickled_is_its_job_s_failure(function: Callable[..., Any], pickled: Codec) -> None:
    with Bench(function, pickled) as bench:
        answers = bench.do(0, 1, 2)

        (failure,) = [failure for answer in answers for failure in answer.failures]
        assert (failure.index, failure.verdict, failure.item_json) == (1, "payload", "1")
        assert "cannot be pickled" in failure.message
        assert "not me" in failure.message
        assert (bench.given(), settled(*answers)) == ([0, 2], [0, 2])
        assert (answers[-1].totals.done, answers[-1].totals.failed) == (2, 1)


def test_an_output_is_as_it_was_when_it_was_given(pickled: Codec) -> None:
    shared: list[int] = []

    def grow(i: int) -> list[int]:
        shared.append(i)
        return shared

    with Bench(grow, pickled) as bench:
        bench.do(1, 2, 3)

        assert bench.given() == [[1], [1, 2], [1, 2, 3]]


# --- batches -------------------------------------------------------------------------------------


def total(batch: list[int]) -> int:
    return sum(batch)


def test_a_batch_is_one_call_and_one_output_of_its_last_job(codec: Codec) -> None:
    with Bench(total, codec, batch=10) as bench:
        answers = bench.do(1, 2, 3)

        assert (settled(*answers), bench.given(), bench.parents()) == ([0, 1, 2], [6], [2])


def test_a_failed_batch_is_a_failure_of_each_item(codec: Codec) -> None:
    def fail(batch: list[int]) -> int:
        raise ValueError("no")

    with Bench(fail, codec, batch=10) as bench:
        (answer,) = bench.do(7, 8)

        assert [(one.index, one.item_json, one.message) for one in answer.failures] == [
            (0, "7", "no"),
            (1, "8", "no"),
        ]
        assert (answer.settled, answer.totals.failed) == ((), 2)


def test_a_batch_leaves_out_what_does_not_fit(codec: Codec) -> None:
    seen = []

    def work(batch: list[int]) -> None:
        seen.append(batch)

    with Bench(work, codec, batch=10) as bench:
        answers = bench.do(1, "two", 3)

        assert seen == [[1, 3]]
        assert settled(*answers) == [0, 2]
        assert [failure.index for answer in answers for failure in answer.failures] == [1]


def test_a_batch_of_which_nothing_fits_is_not_called(codec: Codec) -> None:
    with Bench(total, codec, batch=10) as bench:
        (answer,) = bench.do("one", "two")

        assert (len(answer.failures), answer.settled, bench.given()) == (2, (), [])


def test_a_batch_may_be_filtered_and_may_give_many(codec: Codec) -> None:
    def skip(batch: list[int]) -> int | None:
        return None

    def split(batch: list[int]) -> Iterator[int]:
        yield from batch

    with Bench(skip, codec, batch=10) as bench:
        (answer,) = bench.do(1, 2)
        assert (answer.filtered, answer.totals.filtered) == ((0, 1), 2)
    with Bench(split, codec, batch=10) as bench:
        bench.do(1, 2)
        assert bench.given() == [1, 2]


# --- the page ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [square, box, repeat])
def test_the_page_shows_the_job_in_hand_and_after_the_answer_that_it_was_begun(
    function: Callable[..., Any], codec: Codec
) -> None:
    tickets: list[int] = []

    def work(i: int) -> Any:
        tickets.append(bench.port.page[LANES])
        return function(i)

    work.__annotations__["return"] = read_annotation(function)
    with Bench(work, codec) as bench:
        bench.do(1, 1)
        bench.port.watch = lambda _: tickets.append(-10 if bench.port.page[LANES] < 0 else -20)
        bench.do(1, 1, 1)

        assert tickets == [0, 1, 2, 3, 4, -20]  # while the answer leaves, a death is charged to the last job
        assert bench.port.page[LANES] == past(4)


def read_annotation(function: Callable[..., Any]) -> Any:
    return {square: int, box: Box, repeat: Iterator[int]}[function]


@pytest.mark.parametrize("function", [square, box, repeat, refuse_odd])
def test_jobs_from_the_limit_on_do_not_begin_and_are_not_answered(
    function: Callable[..., Any], codec: Codec
) -> None:
    with Bench(function, codec) as bench:
        bench.do(0, 0)
        bench.port.page[LIMIT] = 4

        answers = bench.do(0, 2, 4, 6)

        assert settled(*answers) == [0, 1]
        assert not [failure for answer in answers for failure in answer.failures]
        assert answers[-1].totals.done == 4


def test_a_limit_lowered_while_a_job_runs_stops_the_next(codec: Codec) -> None:
    def work(i: int) -> int:
        if i == 1:
            bench.port.page[LIMIT] = bench.port.page[LANES] + 1
        return i

    with Bench(work, codec) as bench:
        assert settled(*bench.do(0, 1, 2, 3)) == [0, 1]


def test_a_batch_beyond_the_limit_does_not_begin(codec: Codec) -> None:
    with Bench(total, codec, batch=10) as bench:
        bench.port.page[LIMIT] = 0

        assert settled(*bench.do(1, 2)) == []
        assert bench.given() == []


def test_a_job_sees_itself_and_whether_the_run_is_being_stopped(codec: Codec) -> None:
    seen: list[Any] = []

    def work(i: int, job: Job) -> None:
        seen.append((job.id, job.stage, job.attempt, job.delivery, job.key, job.stopping))
        bench.port.page[STOPPING] = 1

    with Bench(work, codec) as bench:
        bench.do(1, 2, keys=("a", "b"), attempt=3)

        stage = "work"
        assert seen == [
            (f"r1/{stage}/40", stage, 3, 1, "a", False),
            (f"r1/{stage}/41", stage, 3, 1, "b", True),
        ]


def test_what_a_job_says_of_its_progress_is_in_the_answer(codec: Codec) -> None:
    def work(i: int, job: Job) -> None:
        job.progress(i, 10)

    with Bench(work, codec) as bench:
        answers = bench.do(4, 5)

        assert [note for answer in answers for note in answer.notes] == [(0, 4, 10), (1, 5, 10)]


def test_what_is_done_leaves_while_a_slow_job_is_in_hand(codec: Codec) -> None:
    first = threading.Event()

    def work(i: int) -> int:
        if i == 2:
            assert first.wait(20)  # set when the answer for the first two has left
        return i

    with Bench(work, codec, flusher=True) as bench:
        bench.port.watch = lambda answer: first.set() if answer.settled else None

        answers = bench.do(0, 1, 2)

        assert len(answers) == 2
        assert settled(*answers) == [0, 1, 2]
        assert bench.given() == [0, 1, 2]


def test_what_is_done_leaves_however_long_nothing_was_before(codec: Codec) -> None:
    done: list[int] = []
    seen = threading.Event()

    def watch(answer: Answer) -> None:
        done.extend(settled(answer))
        if len(done) == 2:
            seen.set()

    def work(i: int) -> int:
        if i == 0:
            patiently(lambda: not flusher._armed.is_set())
        if i == 2:
            assert seen.wait(20)
        return i

    with Bench(work, codec, flusher=True) as bench:
        flusher = bench.work._outbox.flusher  # type: ignore[attr-defined]
        bench.port.watch = watch

        bench.do(0, 1, 2)

        assert done == [0, 1, 2]


def test_what_is_done_waits_for_the_chunk_s_end_as_long_as_jobs_go_on_ending(codec: Codec) -> None:
    looks: list[bool | None] = []

    def work(i: int) -> int:
        looks.append(bench.work._outbox._look())  # type: ignore[attr-defined]  # as the flusher would
        if i == 3:
            looks.append(bench.work._outbox._look())  # type: ignore[attr-defined]
        return i

    with Bench(work, codec) as bench:
        bench.port.page[HINT] = 100
        answers = bench.do(0, 1, 2, 3, 4)

        assert looks == [False, None, None, None, True, None]
        assert [settled(answer) for answer in answers] == [[0, 1, 2], [3, 4]]
        assert bench.given() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("looks", [True, None])
def test_nobody_who_closes_a_flusher_waits_for_its_next_look(
    looks: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "TICK_SECONDS", 3600)
    flusher = Flusher(lambda: looks, lambda: True)
    flusher.arm()
    thread = flusher._thread
    assert thread is not None

    flusher.close()
    flusher.close()

    assert not thread.is_alive()


def test_a_flusher_that_is_closed_while_it_falls_asleep_ends() -> None:
    class Armed(threading.Event):
        def clear(self) -> None:
            """Be closed by somebody at the worst moment."""
            flusher._ended = True
            self.set()
            super().clear()

    flusher = Flusher(lambda: False, lambda: False)
    flusher._armed = Armed()
    flusher.arm()
    thread = flusher._thread
    assert thread is not None

    thread.join(30)

    assert not thread.is_alive()


def test_what_is_done_waits_for_nobody_where_the_next_stage_starves(codec: Codec) -> None:
    def work(i: int) -> int:
        bench.work._outbox._look()  # type: ignore[attr-defined]  # as the flusher would
        return i

    with Bench(work, codec) as bench:
        bench.port.page[HINT] = 1
        answers = bench.do(0, 1, 2)

        assert [settled(answer) for answer in answers] == [[0], [1], [2]]


# --- resources -----------------------------------------------------------------------------------


def test_resources_open_before_the_first_job_and_close_in_reverse_order(codec: Codec) -> None:
    told: list[str] = []

    def one() -> Iterator[int]:
        told.append("open one")
        yield 1
        told.append("close one")

    def two(one: int) -> Iterator[int]:
        told.append("open two")
        yield one + 1
        told.append("close two")

    def work(i: int, two: int) -> int:
        told.append("work")
        return i + two

    with Bench(work, codec, resources=(one, two)) as bench:
        assert told == []
        bench.do(1)
        bench.do(2)
        assert bench.given() == [4]

    assert told == ["open one", "open two", "work", "work", "close two", "close one"]


def test_parameters_are_bound(codec: Codec) -> None:
    def work(i: int, scale: int = 1) -> int:
        return i * scale

    with Bench(work, codec, values={"scale": 10}) as bench:
        bench.do(1, 2)

        assert bench.given() == [10, 20]


# --- lanes ---------------------------------------------------------------------------------------


async def asquare(i: int) -> int:
    await asyncio.sleep(0)
    return i * i


async def arefuse_odd(i: int) -> Box:
    return refuse_odd(i)


@pytest.mark.parametrize("function", [square, asquare])
def test_lanes_answer_every_job_once(function: Callable[..., Any], codec: Codec) -> None:
    with Bench(function, codec, lanes=3) as bench:
        answers = bench.do(*range(20))

        assert sorted(settled(*answers)) == list(range(20))
        assert sorted(zip(bench.parents(), bench.given(), strict=True)) == [(i, i * i) for i in range(20)]
        assert (answers[-1].totals.done, answers[-1].totals.emitted) == (20, (20,))


@pytest.mark.parametrize("function", [refuse_odd, arefuse_odd])
def test_lanes_tell_failures_as_one_lane_does(function: Callable[..., Any], codec: Codec) -> None:
    with Bench(function, codec, lanes=3) as bench:
        answers = bench.do(*range(6), "six")

        failures = sorted((f.index, f.verdict) for answer in answers for f in answer.failures)
        assert failures == [(1, "error"), (3, "error"), (5, "error"), (6, "payload")]
        assert sorted(settled(*answers)) == [0, 2, 4]


@pytest.mark.parametrize("function", [square, asquare])
def test_lanes_do_not_begin_what_was_taken_back(function: Callable[..., Any], codec: Codec) -> None:
    with Bench(function, codec, lanes=2) as bench:
        bench.port.page[LIMIT] = 3

        answers = bench.do(*range(8))

        assert sorted(settled(*answers)) == [0, 1, 2]
        assert answers[-1].totals.done == 3
        assert sorted(index for answer in answers for index in answer.skipped) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("function", [unpicklable_for_one, unpicklable_for_one_too])
def test_in_lanes_what_can_not_be_pickled_is_its_job_s_failure(
    function: Callable[..., Any], pickled: Codec
) -> None:
    with Bench(function, pickled, lanes=2) as bench:
        answers = bench.do(0, 1, 2)

        (failure,) = [failure for answer in answers for failure in answer.failures]
        assert (failure.index, failure.verdict) == (1, "payload")
        assert sorted(bench.given()) == [0, 2]


def test_the_page_has_a_word_for_each_lane(codec: Codec) -> None:
    together = threading.Barrier(2)
    tickets: list[set[int]] = []

    def work(i: int) -> None:
        together.wait(20)
        tickets.append({bench.port.page[LANES], bench.port.page[LANES + 2]})
        together.wait(20)

    with Bench(work, codec, lanes=2) as bench:
        bench.do(0, 1)

        assert tickets == [{0, 1}, {0, 1}]
        assert {bench.port.page[LANES], bench.port.page[LANES + 2]} == {past(0), past(1)}


# --- producers -----------------------------------------------------------------------------------


def numbers() -> Iterator[int]:
    yield from range(10)


def things() -> Iterator[Box]:
    yield from map(Box, range(10))


def patiently(claim: Callable[[], bool]) -> None:
    """Return when *claim* is true; the time is a safety net only."""
    deadline = time.monotonic() + 20
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def producer(function: Callable[..., Any], codec: Codec, **given: Any) -> Bench:
    return Bench(function, codec, kind="producer", **{"flusher": True, **given})


def test_where_nothing_runs_beside_it_a_producer_ends_its_grant_once_others_can_begin(codec: Codec) -> None:
    with producer(numbers, codec, flusher=False) as bench:
        bench.port.page[HINT] = 2
        given: list[int] = []
        while not bench.grant(100).ended:
            assert 0 < len(bench.given()) < 10
            given += bench.given()

        assert [*given, *bench.given()] == list(range(10))


@pytest.mark.parametrize("function", [numbers, things])
def test_a_producer_gives_as_far_as_it_is_granted(function: Callable[..., Any], codec: Codec) -> None:
    expected = list(function())
    with producer(function, codec) as bench:
        first = bench.grant(4)
        assert (bench.given(), first.final, first.ended) == (expected[:4], True, False)
        second = bench.grant(3)
        assert (bench.given(), second.number, second.ended) == (expected[4:7], 4, False)
        third = bench.grant(1000)

        assert (bench.given(), third.ended, third.totals.done) == (expected[7:], True, 10)
        assert third.totals.emitted == (10,)


@pytest.mark.parametrize("function", [numbers, things])
def test_a_producer_that_has_ended_answers_further_grants_with_nothing(
    function: Callable[..., Any], codec: Codec
) -> None:
    with producer(function, codec) as bench:
        bench.grant(1000)

        answer = bench.grant(10)

        assert (answer.final, answer.settled, answer.outputs) == (True, (), ())


def test_what_comes_first_of_a_slice_does_not_wait_for_the_second(codec: Codec) -> None:
    asleep: Callable[[], bool] = lambda: not flusher._armed.is_set()  # noqa: E731

    def pass_time() -> None:
        """Let the slice take so long that the next one is of one item."""
        until = time.perf_counter() + 2 * SLICE_SECONDS
        while time.perf_counter() < until:
            pass

    def numbers() -> Iterator[int]:
        for number in range(0, 50, 5):
            pass_time()
            yield number
            pass_time()
            yield number + 1
            patiently(asleep)
            yield number + 2
            yield number + 3  # at once: two are asked for next
            yield number + 4
            patiently(lambda last=number + 4: last in bench.given())  # type: ignore[misc]

    with producer(numbers, codec) as bench:
        flusher = bench.work._outbox.flusher  # type: ignore[attr-defined]
        bench.port.page[HINT] = 1

        bench.grant(1000)

        assert bench.given() == list(range(50))


def test_a_producer_s_failure_is_whole_when_the_flusher_sees_it(codec: Codec) -> None:
    seen = []

    class Failures(list[Any]):
        def append(self, failure: Any) -> None:
            seen.append(failure)
            super().append(failure)

    def broken() -> Iterator[int]:
        yield 1
        bench.work._outbox.tally.failures = Failures()  # type: ignore[attr-defined]
        raise OSError("disk gone")

    with producer(broken, codec) as bench:
        (failure,) = bench.grant(10).failures

    assert seen == [failure]
    assert (failure.item_repr, failure.item_type, failure.item_json) == (None, None, None)


def test_bytes_end_a_grant_with_the_item_that_exceeds_them(pickled: Codec) -> None:
    def large() -> Iterator[Box]:
        while True:
            yield Box(b"x" * 1000)

    with producer(large, pickled) as bench:
        bench.grant(1000, 3500)

        assert len(bench.given()) == 4


def test_no_more_long_texts_are_taken_in_one_go_than_a_chunk_may_have(pickled: Codec) -> None:
    def texts() -> Iterator[str]:
        while True:
            yield "x" * 1000

    with producer(texts, pickled) as bench:
        taken = []
        for _ in range(20):  # each time twice as many, were it not for their length
            bench.grant(1000, 1)
            taken.append(len(bench.given()))

    assert max(taken) <= CHUNK_BYTES // 1000 + 1


@pytest.mark.parametrize("function", [numbers, things])
def test_a_producer_ends_at_its_next_yield_when_told_to(function: Callable[..., Any], codec: Codec) -> None:
    with producer(function, codec) as bench:
        bench.grant(2)
        bench.port.page[LIMIT] = 0

        answer = bench.grant(100)

        assert (answer.ended, answer.final, bench.given()) == (False, True, [])  # it may have had more


def test_a_producer_s_failure_is_told_after_what_it_gave(codec: Codec) -> None:
    def broken() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("disk")

    with producer(broken, codec) as bench:
        answer = bench.grant(100)

        (failure,) = [failure for one in bench.port.answers for failure in one.failures]
        assert (failure.index, failure.error, failure.message, failure.item_json) == (
            -1,
            "OSError",
            "disk",
            None,
        )
        assert (bench.given(), answer.ended, answer.totals.done, answer.totals.failed) == ([1, 2], True, 2, 1)


@pytest.mark.parametrize("annotated", [int, object])
def test_an_item_that_can_not_be_pickled_costs_a_producer_no_other(annotated: Any, pickled: Codec) -> None:
    def mixed() -> Iterator[Any]:
        yield from (1, Unpicklable(), 3)

    mixed.__annotations__["return"] = Iterator[annotated]
    with producer(mixed, pickled) as bench:
        answer = bench.grant(100)

        (failure,) = [failure for one in bench.port.answers for failure in one.failures]
        assert (failure.index, failure.verdict, failure.item_type) == (1, "payload", "Unpicklable")
        assert "test_work.py" in failure.message
        assert (bench.given(), answer.ended) == ([1, 3], True)
        assert (answer.totals.done, answer.totals.failed) == (2, 1)


@pytest.mark.parametrize("annotated", [int, object])
def test_a_producer_s_none_is_not_given_on(annotated: Any, codec: Codec) -> None:
    def sparse() -> Iterator[Any]:
        yield from (1, None, None, 4, None)

    sparse.__annotations__["return"] = Iterator[annotated | None]
    with producer(sparse, codec) as bench:
        answer = bench.grant(100)

        assert (bench.given(), answer.totals.done) == ([1, 4], 2)


def test_an_item_is_as_it_was_at_its_yield(pickled: Codec) -> None:
    def same() -> Iterator[list[int]]:
        one: list[int] = []
        for i in range(3):
            one.append(i)
            yield one

    with producer(same, pickled) as bench:
        bench.grant(100)

        assert bench.given() == [[0], [0, 1], [0, 1, 2]]


def test_a_producer_knows_its_shard_and_its_parameters(codec: Codec) -> None:
    def part(shard: Shard, n: int) -> Iterator[int]:
        yield from range(shard.index, n, shard.count)

    with producer(part, codec, shard=Shard(1, 3), values={"n": 8}, workers=3) as bench:
        bench.grant(100)

        assert bench.given() == [1, 4, 7]


def test_a_producer_is_closed_when_its_worker_ends(codec: Codec) -> None:
    closed = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    with producer(endless, codec) as bench:
        bench.grant(3)
        assert closed == []

    assert closed == [True]


def test_a_producer_may_be_async_or_return_a_list(codec: Codec) -> None:
    async def soon() -> AsyncIterator[int]:
        for i in range(3):
            await asyncio.sleep(0)
            yield i

    def ready() -> list[int]:
        return [0, 1, 2]

    for function in (soon, ready):
        with producer(function, codec) as bench:
            answer = bench.grant(100)

            assert (bench.given(), answer.ended) == ([0, 1, 2], True)


def test_what_a_slow_producer_gave_does_not_wait_for_the_next_item(codec: Codec) -> None:
    left = threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        assert left.wait(20)  # set when the first item has left
        yield 2

    with producer(slow, codec) as bench:
        bench.port.page[HINT] = 1000
        bench.port.watch = lambda answer: left.set() if answer.settled else None

        bench.grant(100)

        assert bench.given() == [1, 2]
