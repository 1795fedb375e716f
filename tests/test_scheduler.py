"""The books, with a fake clock and fake workers: no process, no thread, no waiting."""

from __future__ import annotations

import random
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest

from jobq import Pipeline
from jobq.graph import Graph
from jobq.scheduler import CHUNK_JOBS, Dead, Line, Retried, Scheduler
from jobq.wire import CHUNK_BYTES, Answer, Chunk, Failure, Grant, Output, PickleCodec, ReferenceCodec

BY_REFERENCE, PICKLED = ReferenceCodec(), PickleCodec()


class Middle:
    """Always the lower end."""

    def uniform(self, a: float, b: float) -> float:  # noqa: ARG002  # the protocol's names
        return a


# --- pipelines by hand ---------------------------------------------------------------------------


def give() -> Iterator[int]:
    yield 0


def give_text() -> Iterator[str]:
    yield ""


def one(item: int) -> int:
    return item


def text(item: int) -> str:
    return str(item)


def end(item: int) -> None: ...


def end_text(item: str) -> None: ...


def many(item: int) -> Iterator[int]:
    yield item


def either(item: int) -> int | str:
    return item


def batched(items: list[int]) -> int:
    return len(items)


def declare(*consumers: Any) -> Pipeline:
    """Return a pipeline of one producer of ints and *consumers*: functions, with options."""
    pipeline = Pipeline("fake")
    pipeline.producer(give, name="give")
    for number, (function, options) in enumerate(consumers):
        pipeline.consumer(function, **{"name": f"c{number}", **options})
    return pipeline


def fixed_sizes(graph: Graph) -> dict[str, int]:
    """Return how many workers each stage was declared with."""
    return {name: int(node.stage.options.workers) for name, node in graph.nodes.items()}


class World:
    """A scheduler with everything that the driver would do, done by hand."""

    def __init__(self, pipeline: Pipeline, workers: dict[str, int] | None = None) -> None:
        graph = pipeline.graph()
        sizes = fixed_sizes(graph) | (workers or {})
        self.scheduler = Scheduler(graph, sizes, dict.fromkeys(graph.nodes, 1), Middle())
        self.now = 100.0

    def __getitem__(self, name: str) -> Line:
        return self.scheduler.lines[name]

    def give(self, *items: Any, worker: str = "p", stage: str = "give", pickled: bool = False) -> int:
        """Have a producer give *items* as far as it is granted; return how many were."""
        line, given = self[stage], 0
        while given < len(items) and (grant := self.scheduler.grant(line, worker)) is not None:
            block = (PICKLED if pickled else BY_REFERENCE).block(
                [PICKLED.encode(item) if pickled else item for item in items[given : given + grant.count]]
            )
            outputs = (Output(0, block),) if block.count else ()
            answer = Answer(grant.number, True, ((0, block.count),), outputs=outputs)
            self.scheduler.settle_grant(line, worker, answer, self.now)
            given += block.count
        return given

    def end(self, worker: str = "p", stage: str = "give") -> None:
        """Have the producer end."""
        grant = self.scheduler.grant(self[stage], worker)
        assert grant is not None
        self.scheduler.settle_grant(self[stage], worker, Answer(grant.number, True, ended=True), self.now)

    def take(self, stage: str = "c0", worker: str = "w", limit: int = CHUNK_JOBS) -> Chunk:
        """Return a chunk; there must be one."""
        chunk = self.scheduler.take(self[stage], worker, limit)
        assert chunk is not None
        return chunk

    def nothing_for(self, worker: str, stage: str = "c0", limit: int = CHUNK_JOBS) -> bool:
        return self.scheduler.take(self[stage], worker, limit) is None

    def answer(self, chunk: Chunk, *, stage: str = "c0", worker: str = "w", **fields: Any) -> None:
        """Settle *chunk*: whole, with nothing given, unless *fields* say otherwise."""
        answer = Answer(chunk.number, **{"final": True, "settled": ((0, chunk.count),), **fields})
        self.scheduler.settle(self[stage], worker, answer, self.now)

    def fail(self, chunk: Chunk, *indices: int, stage: str = "c0", worker: str = "w", **given: Any) -> None:
        """Let the jobs at *indices* of *chunk* fail and the others be done."""
        rest = tuple((i, i + 1) for i in range(chunk.count) if i not in indices)
        failures = tuple(failure(index, **given) for index in indices)
        self.answer(chunk, stage=stage, worker=worker, settled=rest, failures=failures)

    def lose(self, worker: str = "w", *tickets: int, stage: str = "c0", decoding: int | None = None) -> int:
        return self.scheduler.lost(self[stage], worker, tickets, decoding, "was killed by SIGKILL", self.now)

    def happened(self, kind: type) -> list[Any]:
        return [one for one in self.scheduler.happened if isinstance(one, kind)]

    def results(self) -> list[Any]:
        return [item for _, block in self.scheduler.results for item in decode(block)]


def decode(block: Any) -> list[Any]:
    return (BY_REFERENCE if hasattr(block, "items") else PICKLED).decode(block)


def items(chunk: Chunk) -> list[Any]:
    return [item for part in chunk.parts for item in decode(part.block)]


def failure(index: int, verdict: str = "error", **given: Any) -> Failure:
    return Failure(index, verdict, "ValueError", "no", "", **{"retriable": True, **given})


def outputs(*given: Any, route: int = 0, parents: Sequence[int] | None = None) -> tuple[Output, ...]:
    packed = None if parents is None else array("I", parents).tobytes()
    return (Output(route, BY_REFERENCE.block(given), packed),)


# --- items arrive --------------------------------------------------------------------------------


def test_what_a_producer_gives_waits_at_its_taker_in_order() -> None:
    world = World(declare((end, {})))

    world.give(*range(5))

    assert items(world.take()) == [0, 1, 2, 3, 4]
    assert (world["give"].books.received, world["give"].books.done, world["give"].books.emitted) == (5, 5, 5)
    assert world["c0"].books.received == 5


def test_everybody_who_names_a_source_gets_every_item() -> None:
    world = World(declare((end, {"source": give}), (one, {"source": "give"})))

    world.give(1, 2)

    assert items(world.take("c0")) == items(world.take("c1")) == [1, 2]
    assert {edge.target: edge.received for edge in world.scheduler.edges} == {"c0": 2, "c1": 2, None: 0}


def test_each_route_of_a_union_has_its_own_takers() -> None:
    world = World(declare((either, {}), (one, {}), (end_text, {})))
    world.give(1, 2)
    chunk = world.take()

    world.answer(chunk, outputs=(*outputs(7, route=0, parents=[0]), *outputs("x", route=1, parents=[1])))

    assert (items(world.take("c1")), items(world.take("c2"))) == ([7], ["x"])


def test_what_nobody_takes_is_a_result() -> None:
    world = World(declare((one, {})))
    world.give(1, 2)

    world.answer(world.take(), outputs=outputs(1, 4))

    assert world.results() == [1, 4]


def keyed(**options: Any) -> World:
    return World(declare((end, {"key": str, **options})))


def give_with_keys(world: World, *keys: Any) -> None:
    grant = world.scheduler.grant(world["give"], "p")
    assert grant is not None
    block = BY_REFERENCE.block(list(range(len(keys))))
    answer = Answer(
        grant.number, True, ((0, len(keys)),), outputs=(Output(0, block, None, ((0, tuple(keys)),)),)
    )
    world.scheduler.settle_grant(world["give"], "p", answer, world.now)


def test_an_item_whose_key_was_seen_is_filtered_and_counted() -> None:
    world = keyed(queue_size=100)

    give_with_keys(world, "a", "b", "a", "a", "c")
    give_with_keys(world, "c", "d")

    chunk = world.take()
    assert items(chunk) == [0, 1, 4, 1]
    assert [key for part in chunk.parts for key in part.keys or ()] == ["a", "b", "c", "d"]
    books = world["c0"].books
    assert (books.received, books.filtered, books.duplicates) == (7, 3, 3)


def test_an_item_whose_key_can_not_be_computed_is_a_dead_letter() -> None:
    world = keyed()

    give_with_keys(world, "a", ("!", "key raised ValueError: no"), "b")

    (dead,) = world.happened(Dead)
    assert "key raised ValueError" in dead.failure.message
    assert decode(dead.part.block) == [1]
    assert items(world.take()) == [0, 2]


def test_every_job_of_a_stage_has_a_number_of_its_own() -> None:
    world = keyed()

    give_with_keys(world, "a", ("!", "no"), "a", "b")
    give_with_keys(world, "c")

    numbers = [part.first + i for part in world.take().parts for i in range(part.block.count)]
    numbers += [dead.part.first for dead in world.happened(Dead)]
    assert len(set(numbers)) == 4


# --- chunks --------------------------------------------------------------------------------------


def test_a_chunk_has_at_most_as_many_jobs_as_asked_for_and_the_rest_stays() -> None:
    world = World(declare((end, {})))
    world.give(*range(5))

    assert items(world.take(limit=2)) == [0, 1]
    assert items(world.take(limit=9)) == [2, 3, 4]
    assert world.nothing_for("w")


def test_tickets_count_the_jobs_that_a_worker_was_sent() -> None:
    world = World(declare((end, {})))
    world.give(*range(6))

    numbers = [world.take(worker=worker, limit=2).number for worker in ("w", "v", "w")]

    assert numbers == [0, 0, 2]


def test_a_chunk_of_large_items_is_bounded_by_its_bytes() -> None:
    world = World(declare((end, {})))
    world.give(*(b"x" * (CHUNK_BYTES // 4) for _ in range(12)), pickled=True)

    chunk = world.take()

    assert 1 <= chunk.count <= 4
    assert sum(part.block.nbytes for part in chunk.parts) <= CHUNK_BYTES


def test_an_item_larger_than_a_chunk_travels_alone() -> None:
    world = World(declare((end, {})))
    world.give(b"x" * (3 * CHUNK_BYTES), 1, 2, pickled=True)

    assert world.take().count == 1
    assert items(world.take()) == [1, 2]


def test_chunks_start_at_one_job_and_grow_while_jobs_are_fast() -> None:
    world = World(declare((end, {"queue_size": 10_000})))
    world.give(*range(9000))
    sizes = [world["c0"].target]

    for _ in range(8):
        chunk = world.take(limit=sizes[-1])
        world.answer(chunk, busy=5e-7 * chunk.count)
        sizes.append(world["c0"].target)

    assert sizes[0] == 1
    assert all(small <= large <= 4 * small for small, large in pairwise(sizes))
    assert sizes[-1] == CHUNK_JOBS


def test_chunks_shrink_to_one_job_when_jobs_are_slow() -> None:
    world = World(declare((end, {"queue_size": 10_000})))
    world.give(*range(500))
    for _ in range(6):
        chunk = world.take(limit=world["c0"].target)
        world.answer(chunk, busy=1e-6 * chunk.count)
    assert world["c0"].target > 100
    world.give(*range(10))

    world.answer(world.take(limit=1), busy=1.0)

    assert world["c0"].target == 1


# --- back-pressure -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 10, 333])
def test_a_producer_may_not_give_more_than_the_queue_holds(size: int) -> None:
    world = World(declare((end, {"queue_size": size})))

    assert size <= world.give(*range(5000)) <= size + 1


def test_a_fast_stage_s_queue_is_not_larger_than_it_says() -> None:
    world = World(declare((end, {"queue_size": 10})))
    given = world.give(*range(1000))
    for _ in range(20):
        chunk = world.take(limit=world["c0"].target)
        world.answer(chunk, busy=1e-6 * chunk.count)
        given += world.give(*range(1000))

    in_hand = world.take(limit=1)
    world.give(*range(1000))

    waiting = world["c0"].queued + world["c0"].flying - in_hand.count
    assert waiting <= 10


def test_a_producer_is_asked_for_more_when_there_is_room_for_a_quarter_or_little_left_to_do() -> None:
    world = World(declare((end, {})))
    given = world.give(*range(5000))
    size = world["c0"].queue_size

    asked = []
    for _ in range(size // 2):
        world.answer(world.take(limit=1), busy=1.0)
        asked.append(world.give(*range(5000)))

    assert given > size * 3 // 4
    assert max(asked) > size // 10
    assert len([count for count in asked if count]) <= 5

    world["c0"].target = size  # now all that is queued is less than a chunk for each
    world.answer(world.take(limit=1))

    assert world.give(*range(5000)) > 0


def test_several_producers_share_the_queue() -> None:
    pipeline = Pipeline("fake")
    pipeline.producer(give, name="a")
    pipeline.producer(give, name="b")
    pipeline.consumer(end, name="c0", queue_size=10)
    world = World(pipeline)

    given = [world.give(*range(3), worker="x", stage="a"), world.give(*range(100), worker="y", stage="b")]

    assert given[0] == 3
    assert 10 <= sum(given) <= 11


def test_a_grant_out_in_the_world_counts_as_given() -> None:
    world = World(declare((end, {"queue_size": 10})))
    granted = 0
    for worker in "abcdefgh":
        for _ in range(2):
            grant = world.scheduler.grant(world["give"], worker)
            granted += grant.count if grant else 0

    assert granted <= 11


def test_a_queue_is_bounded_in_bytes_too() -> None:
    world = World(declare((end, {"queue_bytes": 10_000})))

    given = sum(world.give(b"x" * 1000, pickled=True) for _ in range(100))

    assert 9 <= given <= 10


def test_a_single_item_larger_than_the_queue_travels_alone() -> None:
    world = World(declare((end, {"queue_bytes": 1000})))

    assert world.give(b"x" * 100_000, pickled=True) == 1
    assert world.give(b"y", pickled=True) == 0
    world.answer(world.take())
    assert world.give(b"y", pickled=True) == 1


def test_a_stage_does_not_start_jobs_whose_outputs_have_no_room() -> None:
    world = World(declare((one, {"queue_size": 50}), (end, {"queue_size": 3})))
    world.give(*range(50))

    chunk = world.take()
    world.answer(chunk, outputs=outputs(*range(chunk.count)))

    assert 3 <= chunk.count <= 4
    assert world.nothing_for("w")
    world.answer(world.take("c1"), stage="c1")
    assert world.take().count == chunk.count


def test_a_full_consumer_of_results_holds_back_the_last_stage() -> None:
    world = World(declare((one, {})))
    room = [0]
    world.scheduler.results_room = lambda: room[0]
    world.give(1, 2, 3)
    assert world.nothing_for("w")

    room[0] = 2

    assert world.take().count == 2
    assert world.nothing_for("w")


def back_and_forth(item: int) -> Iterator[int | str]:
    yield item


def test_what_flows_back_in_a_loop_takes_no_credit() -> None:
    pipeline = Pipeline("fake")
    pipeline.producer(give, name="give")
    pipeline.consumer(back_and_forth, name="c0", source=["give", "c0"], queue_size=3)
    world = World(pipeline)
    world.give(*range(3))

    chunk = world.take()
    world.answer(chunk, outputs=outputs(*range(100), parents=[0] * 100))

    assert world["c0"].queued == 100
    assert world.give(1) == 0  # producers wait meanwhile
    assert world.take().count > 0


# --- what becomes of a job -----------------------------------------------------------------------


def test_settled_jobs_are_done_and_filtered_ones_are_both_settled_and_filtered() -> None:
    world = World(declare((end, {})))
    world.give(*range(5))

    world.answer(world.take(), filtered=(1, 4))

    books = world["c0"].books
    assert (books.done, books.filtered, books.received) == (3, 2, 5)


def test_a_chunk_may_be_answered_bit_by_bit() -> None:
    world = World(declare((one, {})))
    world.give(*range(5))
    chunk = world.take()

    world.answer(chunk, final=False, settled=((0, 2),), outputs=outputs("a", "b"))
    assert (world["c0"].flying, world.results()) == (3, ["a", "b"])
    world.answer(chunk, final=False, settled=((3, 4),), outputs=outputs("d"))
    world.answer(chunk, settled=((2, 3), (4, 5)), outputs=outputs("c", "e"))

    assert (world["c0"].flying, world["c0"].books.done) == (0, 5)


def test_what_a_worker_did_not_begin_by_its_last_word_waits_again() -> None:
    world = World(declare((end, {})))
    world.give(*range(5))
    chunk = world.take()

    world.answer(chunk, settled=((0, 2),))

    assert items(world.take(worker="v")) == [2, 3, 4]
    assert world["c0"].books.done == 2


def test_a_failed_job_waits_for_its_back_off_and_is_tried_again() -> None:
    world = World(declare((end, {"max_retries": 2, "min_backoff": 4.0})))
    world.give("a", "b")
    world.fail(world.take(), 0)
    line = world["c0"]
    assert (world.nothing_for("w"), world.scheduler.next_due(line)) == (True, 104.0)

    world.scheduler.due(line, 103.9)
    assert world.nothing_for("w")
    world.scheduler.due(line, 104.0)

    chunk = world.take()
    assert (items(chunk), chunk.parts[0].attempt, chunk.parts[0].delivery) == (["a"], 2, 1)
    (told,) = world.happened(Retried)
    assert (told.part.attempt, told.delay) == (1, 4.0)
    assert (line.books.retried, line.books.dead) == (1, 0)


def test_a_job_without_retries_left_is_a_dead_letter_with_its_item() -> None:
    world = World(declare((end, {"max_retries": 1, "min_backoff": 0})))
    world.give("a", "b")
    world.fail(world.take(), 1)
    world.scheduler.due(world["c0"], world.now)

    world.fail(world.take(), 0)

    (dead,) = world.happened(Dead)
    assert (decode(dead.part.block), dead.part.attempt, dead.part.first) == (["b"], 2, 1)
    assert (world["c0"].books.done, world["c0"].books.dead, world["c0"].unsettled) == (1, 1, 0)


def test_failed_jobs_come_back_in_the_order_in_which_they_are_due() -> None:
    world = World(declare((end, {"max_retries": 1})))
    world.give("a", "b", "c")
    chunk = world.take()
    failures = tuple(failure(i, "retry", delay=delay) for i, delay in enumerate((9.0, 1.0, 5.0)))

    world.answer(chunk, settled=(), failures=failures)
    world.scheduler.due(world["c0"], world.now + 9)

    assert items(world.take()) == ["b", "c", "a"]


# --- deaths --------------------------------------------------------------------------------------


def test_only_the_job_in_hand_is_charged_with_a_death() -> None:
    world = World(declare((end, {})))
    world.give(*range(5))
    chunk = world.take()
    world.answer(chunk, final=False, settled=((0, 1),))

    assert world.lose("w", chunk.number + 2) == 4

    found = [(item, part.delivery) for part in world.take(worker="v").parts for item in decode(part.block)]
    assert sorted(found) == [(1, 1), (2, 2), (3, 1), (4, 1)]
    assert world["c0"].books.redelivered == 1


def test_an_idle_worker_s_death_costs_nothing() -> None:
    world = World(declare((end, {})))
    world.give(1)
    world.answer(world.take())

    assert world.lose("w", 0) == 0
    assert world["c0"].books.redelivered == 0


def test_jobs_that_were_only_sent_are_not_charged() -> None:
    world = World(declare((end, {})))
    world.give(*range(4))
    world.take(limit=2)
    world.take(limit=2)

    assert world.lose() == 4

    chunk = world.take(worker="v")
    assert items(chunk) == [0, 1, 2, 3]
    assert {part.delivery for part in chunk.parts} == {1}


def test_a_job_that_kills_its_worker_each_time_is_given_up_after_max_deliveries() -> None:
    world = World(declare((end, {"max_deliveries": 3})))
    world.give("poison", "fine")

    for delivery in (1, 2, 3):
        chunk = world.take(worker=f"w{delivery}", limit=1)
        assert (items(chunk), chunk.parts[0].delivery) == (["poison"], delivery)
        world.lose(f"w{delivery}", 0)

    (dead,) = world.happened(Dead)
    assert (dead.failure.error, dead.part.delivery, decode(dead.part.block)) == ("WorkerLost", 3, ["poison"])
    assert "3 times" in dead.failure.message
    assert "SIGKILL" in dead.failure.message
    assert items(world.take(worker="w4")) == ["fine"]


def test_where_several_were_in_hand_each_is_tried_alone_and_uncharged() -> None:
    world = World(declare((end, {"max_deliveries": 1})))
    world.give(*range(4))
    chunk = world.take()

    world.lose("w", chunk.number, chunk.number + 2)

    assert world.happened(Dead) == []
    first = world.take(worker="a")
    assert (first.count, first.parts[0].delivery) == (1, 1)
    assert world.nothing_for("a")  # it is tried alone


def test_where_several_were_claimed_each_is_tried_alone_and_charged_once() -> None:
    world = World(declare((end, {"max_deliveries": 3})))
    world.give(*range(4))
    chunk = world.take()

    world.lose("w", chunk.number, chunk.number + 1, chunk.number + 2)

    assert world["c0"].books.redelivered == 1
    first = world.take(worker="a")
    assert (items(first), first.parts[0].delivery) == ([0], 2)
    world.answer(first, worker="a")
    second = world.take(worker="a")
    world.lose("a", second.number)
    third, fourth, rest = (world.take(worker=worker) for worker in "bcd")
    assert (items(third), third.parts[0].delivery) == ([1], 3)
    assert (items(fourth), fourth.parts[0].delivery) == ([2], 2)
    assert (items(rest), rest.parts[0].delivery) == ([3], 1)


def test_one_that_is_tried_alone_and_comes_back_unbegun_is_tried_alone_again() -> None:
    world = World(declare((end, {"max_deliveries": 1})))
    world.give(*range(4))
    chunk = world.take()
    world.lose("w", chunk.number, chunk.number + 2)

    world.answer(world.take(worker="a"), worker="a", settled=())

    assert [world.take(worker=worker).count for worker in "bc"] == [1, 1]


def test_one_that_is_tried_alone_and_kills_or_is_not_begun_keeps_its_place() -> None:
    world = World(declare((end, {"max_deliveries": 3})))
    world.give(*range(3))
    chunk = world.take()
    world.lose("w", decoding=chunk.number)

    world.lose("a", world.take(worker="a").number)  # in hand
    again = world.take(worker="b")
    world.lose("b")  # not begun

    assert items(again) == [0]
    assert [items(world.take(worker=worker)) for worker in "cde"] == [[0], [1], [2]]


def test_where_several_chunks_were_in_hand_nobody_is_charged_either() -> None:
    world = World(declare((end, {"max_deliveries": 1})))
    world.give(*range(4))
    one, two = world.take(limit=2), world.take(limit=2)

    world.lose("w", one.number + 1, two.number)

    assert world.happened(Dead) == []
    assert sorted(items(world.take(worker="a")) + items(world.take(worker="b"))) == [1, 2]


def test_a_death_while_items_are_loaded_makes_all_of_them_suspects() -> None:
    world = World(declare((end, {"max_deliveries": 1})))
    world.give(*range(3))
    chunk = world.take()

    world.lose("w", decoding=chunk.number)

    for worker in "abc":
        assert world.take(worker=worker).count == 1
    world.lose("b", decoding=0)
    (dead,) = world.happened(Dead)
    assert not dead.loadable


def test_a_suspect_is_not_given_to_a_worker_that_has_something_else() -> None:
    world = World(declare((end, {})))
    world.give(*range(6))
    world.take(worker="busy", limit=1)
    chunk = world.take(limit=2)

    world.lose("w", chunk.number, chunk.number + 1)

    assert world.nothing_for("busy")
    assert world.take(worker="free").count == 1


def test_what_came_after_a_death_is_settled_once() -> None:
    world = World(declare((one, {})))
    world.give("a", "b")
    chunk = world.take()
    world.answer(chunk, final=False, settled=((0, 1),), outputs=outputs("A"))
    world.lose("w", 1)

    world.answer(world.take(worker="v"), worker="v", outputs=outputs("B"))

    assert world.results() == ["A", "B"]
    assert (world["c0"].books.received, world["c0"].books.done, world["c0"].unsettled) == (2, 2, 0)


def test_a_producer_s_death_is_one_dead_letter_and_what_it_gave_stays() -> None:
    world = World(declare((end, {})))
    world.give(*range(3))
    world.scheduler.grant(world["give"], "p")

    world.scheduler.lost_producer(world["give"], "p", "was killed by SIGKILL")

    (dead,) = world.happened(Dead)
    assert (dead.part, dead.failure.error, dead.stage) == (None, "WorkerLost", "give")
    books = world["give"].books
    assert (books.received, books.done, books.dead, world["give"].producing) == (4, 3, 1, 0)
    world.answer(world.take())
    assert world.scheduler.finished


def test_a_dead_producer_s_grant_is_room_for_others() -> None:
    pipeline = Pipeline("fake")
    pipeline.producer(give, name="a")
    pipeline.producer(give, name="b")
    pipeline.consumer(end, name="c0", queue_size=10)
    world = World(pipeline)
    while world.scheduler.grant(world["a"], "x") is not None:
        pass

    world.scheduler.lost_producer(world["a"], "x", "died")

    assert world.give(*range(100), worker="y", stage="b") >= 10


# --- taking back ---------------------------------------------------------------------------------


def test_jobs_taken_back_wait_first_and_in_order() -> None:
    world = World(declare((end, {})))
    world.give(*range(6))
    chunk = world.take(limit=4)

    assert world.scheduler.take_back(world["c0"], "w", chunk.number + 1) == 3

    assert items(world.take(worker="v")) == [1, 2, 3, 4, 5]
    assert world["c0"].flights["w"][chunk.number].open == [(0, 1)]


def test_jobs_of_several_chunks_are_taken_back_in_order() -> None:
    world = World(declare((end, {})))
    world.give(*range(6))
    world.take(limit=3)
    world.take(limit=3)

    world.scheduler.take_back(world["c0"], "w", 2)

    assert items(world.take(worker="v")) == [2, 3, 4, 5]


def test_jobs_that_a_worker_refuses_wait_again_and_those_taken_back_are_told_apart() -> None:
    world = World(declare((end, {})))
    world.give(*range(6))
    chunk = world.take()
    world.scheduler.take_back(world["c0"], "w", 4)

    # The limit was below 2 when the worker looked at it, and 2 and 3 were taken for begun.
    recalled = world.scheduler.settle(
        world["c0"],
        "w",
        Answer(chunk.number, final=False, settled=((0, 1),), skipped=(3, 2, 5, 4)),
        world.now,
    )

    assert recalled == 2
    assert items(world.take(worker="v")) == [2, 3, 4, 5]
    assert world["c0"].flights["w"][chunk.number].open == [(1, 2)]


def test_a_late_answer_for_a_job_taken_back_counts_once() -> None:
    world = World(declare((one, {})))
    world.give("a", "b", "c")
    chunk = world.take()
    world.scheduler.take_back(world["c0"], "w", 1)
    other = world.take(worker="v")

    world.answer(chunk, outputs=outputs("A", "late b", "late c"), filtered=(2,))
    world.answer(other, worker="v", outputs=outputs("B", "C"))

    books = world["c0"].books
    assert world.results() == ["A", "B", "C"]
    assert (books.received, books.done, books.filtered) == (3, 3, 0)
    assert (books.late_done, books.late_filtered) == (1, 1)


def test_a_late_failure_of_a_job_taken_back_is_not_a_dead_letter() -> None:
    world = World(declare((end, {})))
    world.give("a", "b")
    chunk = world.take()
    world.scheduler.take_back(world["c0"], "w", 1)
    other = world.take(worker="v")

    world.fail(chunk, 1)
    world.answer(other, worker="v")

    assert world.happened(Dead) == []
    assert (world["c0"].books.done, world["c0"].books.late_failed) == (2, 1)


def test_a_worker_whose_jobs_were_taken_back_may_die_without_harm() -> None:
    world = World(declare((end, {})))
    world.give("a", "b", "c")
    world.take()
    world.scheduler.take_back(world["c0"], "w", 1)
    other = world.take(worker="v")

    assert world.lose("w", 0) == 1

    assert items(other) == ["b", "c"]
    assert items(world.take(worker="u")) == ["a"]


# --- batches -------------------------------------------------------------------------------------


def test_a_failed_batch_is_tried_again_whole() -> None:
    world = World(declare((batched, {"batch": 3, "max_retries": 1, "min_backoff": 0})))
    world.give(*range(5))
    chunk = world.take(limit=3)

    world.answer(chunk, settled=(), failures=tuple(failure(i) for i in range(3)))
    world.scheduler.due(world["c0"], world.now)

    again = world.take(limit=3)
    assert items(again) == [0, 1, 2]
    assert {part.attempt for part in again.parts} == {2}


def test_a_batch_without_retries_left_is_one_dead_letter_an_item() -> None:
    world = World(declare((batched, {"batch": 3})))
    world.give(*range(3))

    world.answer(world.take(), settled=(), failures=tuple(failure(i) for i in range(3)))

    assert [decode(dead.part.block) for dead in world.happened(Dead)] == [[0], [1], [2]]


def test_a_batch_that_kills_its_worker_is_charged_whole_and_travels_whole() -> None:
    world = World(declare((batched, {"batch": 3, "max_deliveries": 2})))
    world.give(*range(5))

    for worker in ("a", "b"):
        chunk = world.take(worker=worker, limit=3)
        assert items(chunk) == [0, 1, 2]
        world.lose(worker, chunk.number)

    assert [decode(dead.part.block) for dead in world.happened(Dead)] == [[0], [1], [2]]
    assert items(world.take(worker="c", limit=3)) == [3, 4]


def test_items_put_back_before_their_batch_began_still_have_a_time_to_leave() -> None:
    world = World(declare((batched, {"batch": 3})))
    world.give(1)
    world.take(limit=3)
    assert world["c0"].oldest is None

    world.lose("w")

    assert world["c0"].oldest is not None


# --- order ---------------------------------------------------------------------------------------


def ordered(**options: Any) -> World:
    world = World(declare((one, {"ordered": True, "workers": 2, **options})))
    world.give(*range(6))
    return world


def test_an_ordered_stage_gives_on_in_the_order_of_arrival() -> None:
    world = ordered()
    one, two = world.take(worker="a", limit=2), world.take(worker="b", limit=2)

    world.answer(two, worker="b", outputs=outputs("c", "d"))
    assert world.results() == []
    world.answer(one, worker="a", final=False, settled=((0, 1),), outputs=outputs("a"))
    assert world.results() == ["a"]
    world.answer(one, worker="a", settled=((1, 2),), outputs=outputs("b"))

    assert world.results() == ["a", "b", "c", "d"]


def test_a_dead_job_of_an_ordered_stage_leaves_no_gap() -> None:
    world = ordered()
    one, two = world.take(worker="a", limit=1), world.take(worker="b", limit=1)
    world.answer(two, worker="b", outputs=outputs("b"))

    world.fail(one, 0, worker="a")

    assert world.results() == ["b"]


def test_a_job_of_an_ordered_stage_that_is_given_up_leaves_no_gap() -> None:
    world = ordered(max_deliveries=1)
    world.take(worker="a", limit=1)
    world.answer(world.take(worker="b", limit=1), worker="b", outputs=outputs("b"))

    world.lose("a", 0)

    assert world.results() == ["b"]


def test_a_batch_of_an_ordered_stage_that_is_given_up_leaves_no_gap() -> None:
    world = World(declare((batched, {"ordered": True, "batch": 2, "max_deliveries": 1})))
    world.give(*range(4))
    first, second = world.take(worker="a", limit=2), world.take(worker="b", limit=2)
    world.answer(second, worker="b", outputs=outputs("second", parents=[1]))

    world.lose("a", first.number)

    assert world.results() == ["second"]


def settle_all_that_may_start(world: World) -> list[Any]:
    """Let another worker do whatever it gets; return the items."""
    done: list[Any] = []
    while (chunk := world.scheduler.take(world["c0"], "b", 1)) is not None:
        done += items(chunk)
        world.answer(chunk, worker="b", outputs=outputs(*items(chunk)))
    assert done
    return done


def test_a_first_job_that_is_tried_again_holds_the_others_but_not_itself() -> None:
    world = ordered(queue_size=2, max_retries=1, min_backoff=0)
    first = world.take(worker="a", limit=1)
    held = settle_all_that_may_start(world)

    world.fail(first, 0, worker="a")
    world.scheduler.due(world["c0"], world.now)
    again = world.take(worker="a", limit=1)
    world.answer(again, worker="a", outputs=outputs(0))

    assert items(again) == [0]
    assert world.results() == [0, *held]


def test_a_first_job_that_is_taken_back_or_lost_can_start_again() -> None:
    world = ordered(queue_size=2)
    chunk = world.take(worker="a", limit=1)
    settle_all_that_may_start(world)

    world.lose("a")

    assert items(world.take(worker="c", limit=1)) == items(chunk) == [0]


def test_what_a_failed_job_of_an_ordered_stage_gave_ahead_is_counted_as_given_to_nobody() -> None:
    world = ordered(max_retries=1)
    world.give(1, 2)
    world.take(limit=1, worker="a")
    second = world.take(limit=1, worker="b")

    world.answer(second, worker="b", final=False, settled=(), outputs=outputs("x", "y", parents=[0, 0]))
    world.answer(second, worker="b", settled=(), failures=(failure(0),))

    assert world["c0"].books.late_emitted == {0: 2}


def test_parts_of_a_job_that_was_taken_back_are_late() -> None:
    world = ordered()
    world.give(1, 2)
    chunk = world.take(limit=2)
    world.scheduler.take_back(world["c0"], "w", 1)

    world.answer(chunk, final=False, settled=(), outputs=outputs("x", parents=[1]))

    assert world["c0"].books.late_emitted == {0: 1}


def test_an_ordered_stage_holds_at_most_as_many_outputs_as_its_queue() -> None:
    world = World(declare((one, {"ordered": True, "queue_size": 4, "workers": 2})))
    world.give(*range(100))
    world.take(worker="a", limit=1)
    held = 0

    while (chunk := world.scheduler.take(world["c0"], "b", 3)) is not None:
        world.answer(chunk, worker="b", outputs=outputs(*range(chunk.count)))
        held += chunk.count
        world.give(*range(100))

    assert 0 < held <= 4


# --- the end -------------------------------------------------------------------------------------


def test_a_run_is_finished_when_producers_have_ended_and_nothing_is_left() -> None:
    world = World(declare((end, {"max_retries": 1, "min_backoff": 0})))
    world.give("a")
    world.end()
    assert not world.scheduler.finished

    world.fail(world.take(), 0)
    assert not world.scheduler.finished  # it waits for its next attempt
    world.scheduler.due(world["c0"], world.now)
    world.answer(world.take())

    assert world.scheduler.finished


def test_a_stage_knows_when_nothing_more_can_come_by_itself() -> None:
    world = World(declare((one, {}), (batched, {"batch": 5})))
    world.give("a")
    assert not world.scheduler.upstream_quiet(world["c1"])
    world.end()
    assert not world.scheduler.upstream_quiet(world["c1"])

    world.answer(world.take(), outputs=outputs("A"))

    assert world.scheduler.upstream_quiet(world["c1"])


def test_what_is_cancelled_is_everything_that_is_not_settled() -> None:
    world = World(declare((end, {"max_retries": 1})))
    world.give(*range(6))
    chunk = world.take(limit=3)
    world.answer(chunk, final=False, settled=((0, 1),), failures=(failure(1),))

    cancelled = world.scheduler.cancel(world["c0"], 0.0)

    books = world["c0"].books
    assert sorted(item for part in cancelled for item in decode(part.block)) == [1, 2, 3, 4, 5]
    assert (books.received, books.done, books.cancelled, world["c0"].unsettled) == (6, 1, 5, 0)


def test_what_an_ordered_stage_held_goes_on_when_the_jobs_before_it_are_cancelled() -> None:
    world = ordered()
    world.give(1, 2)
    world.take(limit=1, worker="a")
    world.answer(world.take(limit=1, worker="b"), worker="b", outputs=outputs("B"))

    world.scheduler.cancel(world["c0"], 0.0)

    assert world.results() == ["B"]
    books = world["c0"].books
    assert (books.done, books.cancelled) == (1, books.received - 1)


# --- a random walk -------------------------------------------------------------------------------


class FakeWorker:
    """A worker whose jobs end as chance has it."""

    def __init__(self, stage: str, name: str) -> None:
        self.stage, self.name = stage, name
        self.chunks: deque[Chunk] = deque()
        self.ended: list[tuple[int, str]] = []  # jobs of the first chunk that ended, and how
        self.at = 0  # how many of its jobs were begun
        self.limit: int | None = None

    @property
    def ticket(self) -> int | None:
        """The job that the page shows: the last that was begun and not answered."""
        return self.chunks[0].number + self.at - 1 if self.chunks and self.ended else None


class Walk:
    """A random graph, driven by random moves; the model remembers what became of every job."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.calm = False  # from now on nothing goes wrong
        self.kinds: dict[str, str] = {}
        pipeline = self.declare()
        graph = pipeline.graph()
        self.sizes = fixed_sizes(graph)
        self.scheduler = Scheduler(graph, self.sizes, dict.fromkeys(graph.nodes, 1), self.chance)
        self.left = {name: self.chance.randint(0, 40) for name, kind in self.kinds.items() if kind == "give"}
        self.grants: dict[str, list[Grant]] = defaultdict(list)
        self.serial = 0
        self.workers = [
            self.worker(name)
            for name, kind in self.kinds.items()
            if kind != "give"
            for _ in range(self.sizes[name])
        ]
        self.fates: dict[str, dict[int, str]] = defaultdict(dict)
        self.emitted: dict[str, int] = defaultdict(int)
        self.ordered_out: dict[str, list[int]] = defaultdict(list)
        self.deaths = 0

    def declare(self) -> Pipeline:
        """Return a chain of one to three stages, each of a kind that chance picks."""
        chance, pipeline = self.chance, Pipeline("walk")
        for number in range(chance.randint(1, 2)):
            pipeline.producer(give, name=f"give{number}")
            self.kinds[f"give{number}"] = "give"
        sources = list(self.kinds)
        for number in range(chance.randint(1, 3)):
            kind, name = chance.choice(("one", "ordered", "many", "batch", "loop")), f"c{number}"
            self.kinds[name] = kind
            functions: dict[str, Callable[..., Any]] = {"many": many, "batch": batched, "loop": many}
            options: dict[str, Any] = {"batch": chance.randint(1, 4)} if kind == "batch" else {}
            pipeline.consumer(
                functions.get(kind, one),
                name=name,
                source=[*sources, name] if kind == "loop" else sources,
                workers=chance.randint(1, 3),
                queue_size=chance.choice((1, 2, 5, 30)),
                max_retries=chance.randint(0, 2),
                max_deliveries=chance.randint(1, 3),
                ordered=kind == "ordered",
                min_backoff=chance.choice((0.0, 1.0)),
                **options,
            )
            sources = [name]
        return pipeline

    def worker(self, stage: str) -> FakeWorker:
        self.serial += 1
        return FakeWorker(stage, f"{stage}-{self.serial}")

    # moves

    def give(self) -> None:
        for name in self.left:
            line = self.scheduler.lines[name]
            if line.producing and len(self.grants[name]) < 2:
                grant = self.scheduler.grant(line, f"{name}-1")
                if grant is not None:
                    assert grant.count > 0
                    self.grants[name].append(grant)
            if self.grants[name] and self.chance.random() < 0.7:
                self.answer_grant(name, self.grants[name].pop(0))

    def answer_grant(self, name: str, grant: Grant) -> None:
        line = self.scheduler.lines[name]
        count = min(grant.count, self.left[name])
        self.left[name] -= count
        self.emitted[name] += count
        out = outputs(*range(count)) if count else ()
        over = self.left[name] == 0 and bool(line.producing)
        answer = Answer(grant.number, True, ((0, count),) if count else (), outputs=out, ended=over)
        self.scheduler.settle_grant(line, f"{name}-1", answer, self.now)

    def dispatch(self) -> None:
        for worker in self.workers:
            line = self.scheduler.lines[worker.stage]
            self.scheduler.due(line, self.now)
            room = 1 if line.batch is not None else 2
            if len(worker.chunks) < room and worker.limit is None:
                limit = line.batch or self.chance.randint(1, 4)
                chunk = self.scheduler.take(line, worker.name, limit)
                if chunk is not None:
                    assert 1 <= chunk.count <= max(limit, 1)
                    worker.chunks.append(chunk)

    def work(self, worker: FakeWorker) -> None:
        """Let it do some jobs of its first chunk, and perhaps answer for them."""
        if not worker.chunks:
            return
        chunk = worker.chunks[0]
        if self.kinds[worker.stage] == "batch":
            fate = self.fate()
            worker.ended = [(index, fate) for index in range(chunk.count)]
            worker.at = chunk.count
        cut = False
        for _ in range(self.chance.randint(1, 3)):
            cut = worker.limit is not None and chunk.number + worker.at >= worker.limit
            if cut or worker.at == chunk.count:
                break
            worker.ended.append((worker.at, self.fate()))
            worker.at += 1
        final = cut or worker.at == chunk.count
        if final or self.chance.random() < 0.5:
            self.answer(worker, chunk, final)

    def fate(self) -> str:
        if self.calm:
            return "done"
        return self.chance.choices(("done", "filtered", "error", "reject"), (12, 1, 2, 1))[0]

    def answer(self, worker: FakeWorker, chunk: Chunk, final: bool) -> None:
        line, kind = self.scheduler.lines[worker.stage], self.kinds[worker.stage]
        settled = [index for index, fate in worker.ended if fate in ("done", "filtered")]
        parents = [index for index, fate in worker.ended if fate == "done" for _ in range(self.count(kind))]
        if kind == "batch":
            parents = parents[-1:]
        flight = line.flights[worker.name][chunk.number]
        given = [flight.job(index).first for index in parents]  # each output says which job it is from
        out = outputs(*given, parents=parents) if parents else ()
        self.emitted[worker.stage] += len(parents)
        failures = tuple(failure(index, fate) for index, fate in worker.ended if fate in ("error", "reject"))
        answer = Answer(
            chunk.number,
            final,
            tuple((index, index + 1) for index in settled),
            tuple(index for index, fate in worker.ended if fate == "filtered"),
            failures,
            out,
        )
        self.scheduler.settle(line, worker.name, answer, self.now)
        worker.ended = []
        if final:
            worker.chunks.popleft()
            worker.at = 0
            if not worker.chunks:
                worker.limit = None

    def count(self, kind: str) -> int:
        if kind == "many":
            return self.chance.choice((0, 1, 2, 3))
        if kind == "loop":
            return 0 if self.calm else self.chance.choice((0, 0, 0, 1, 2))
        return 1

    def die(self, worker: FakeWorker) -> None:
        self.deaths += 1
        tickets = [] if worker.ticket is None else [worker.ticket]
        if self.kinds[worker.stage] == "batch" and worker.chunks and self.chance.random() < 0.5:
            tickets = [worker.chunks[0].number]
        decoding = worker.chunks[0].number if worker.chunks and self.chance.random() < 0.1 else None
        line = self.scheduler.lines[worker.stage]
        self.scheduler.lost(line, worker.name, tickets, decoding, "died", self.now)
        self.workers[self.workers.index(worker)] = self.worker(worker.stage)

    def take_back(self, worker: FakeWorker) -> None:
        if self.kinds[worker.stage] == "batch" or not worker.chunks or worker.limit is not None:
            return
        worker.limit = worker.chunks[0].number + worker.at
        self.scheduler.take_back(self.scheduler.lines[worker.stage], worker.name, worker.limit)

    def move(self) -> None:
        self.now += self.chance.random()
        pick = self.chance.choice(self.workers)
        self.give()
        self.dispatch()
        rare = self.chance.random()
        if not self.calm and rare < 0.03:
            self.die(pick)
        elif not self.calm and rare < 0.10:
            self.take_back(pick)
        else:
            self.work(pick)
        self.scheduler.results.clear()

    # what must be true

    def check(self) -> None:
        for name, line in self.scheduler.lines.items():
            books = line.books
            settled = books.done + books.filtered + books.dead + books.cancelled
            if line.is_producer:
                assert books.received == settled
                continue
            waiting = [*line.waiting, *line.solo]
            for group in (*line.groups, *(group for _, _, group in line.delayed)):
                waiting += group
            flying = [
                part
                for flights in line.flights.values()
                for flight in flights.values()
                for part in flight.parts(flight.open)
            ]
            places = [part.first + i for part in (*waiting, *flying) for i in range(part.block.count)]
            assert len(set(places)) == len(places), f"{name}: a job is in two places"
            assert line.queued == sum(part.block.count for part in waiting)
            assert line.flying == sum(part.block.count for part in flying)
            assert books.received == settled + len(places), f"{name}: the books don't balance"
            self.check_limits(name, line)

    def check_limits(self, name: str, line: Line) -> None:
        strict = (
            all(self.kinds[source] in ("give", "one", "ordered", "batch") for source in line.before)
            and self.kinds[name] != "loop"
        )
        if strict:
            queue = max(line.node.stage.consumer.queue_size, line.batch or 0)
            assert line.queued + line.flying <= queue + self.sizes[name], (
                f"{name}: more than its queue holds {self.kinds}"
            )

    def check_end(self) -> None:
        lines = self.scheduler.lines
        for name, grants in self.grants.items():
            while grants:
                self.answer_grant(name, grants.pop(0))
        for edge in self.scheduler.edges:
            assert edge.received == self.emitted[edge.source] == lines[edge.source].books.emitted
            if edge.target is not None and self.kinds[edge.source] not in ("give", "loop"):
                own = [one for one in self.scheduler.edges if one.target == edge.target]
                assert lines[edge.target].books.received == sum(one.received for one in own)
        dead = [one for one in self.scheduler.happened if isinstance(one, Dead)]
        assert len(dead) == sum(line.books.dead for line in lines.values())
        assert all(line.promised == 0 and line.promised_bytes == 0 for line in lines.values())


@pytest.mark.parametrize("seed", range(120))
def test_a_random_walk_loses_nothing_and_ends(seed: int) -> None:
    walk = Walk(seed)
    order: dict[str, list[int]] = defaultdict(list)
    emit = walk.scheduler.emit

    def noting(line: Line, output: Output, roots: tuple[int, ...] | None, now: float) -> None:
        order[line.name] += decode(output.block)
        emit(line, output, roots, now)

    walk.scheduler.emit = noting  # type: ignore[method-assign]  # to see in which order outputs leave

    for step in range(6000):
        walk.calm = step > 400
        walk.move()
        walk.check()
        if walk.scheduler.finished:
            break

    assert walk.scheduler.finished, {
        f"{name} ({walk.kinds[name]})": line.unsettled for name, line in walk.scheduler.lines.items()
    }
    walk.check_end()
    for name, kind in walk.kinds.items():
        if kind == "ordered":
            assert order[name] == sorted(order[name])
