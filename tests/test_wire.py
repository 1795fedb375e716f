"""Messages survive their frames, blocks can be cut without decoding, and one bad item harms no other."""

from __future__ import annotations

import enum
import pickle
from array import array
from dataclasses import dataclass
from typing import Any

import pytest

from jobq.errors import BrokenChannel
from jobq.wire import (
    PREFIX,
    Answer,
    Block,
    Bye,
    Chunk,
    Codec,
    Counted,
    Failure,
    Grant,
    Hello,
    Order,
    Output,
    PackedObjects,
    PackedScalars,
    Part,
    PickleCodec,
    ReferenceCodec,
    Said,
    Totals,
    Undecodable,
    frame_length,
    pack,
    unpack,
)


@dataclass
class Point:
    x: int
    y: list[int]


class Number(enum.IntEnum):
    ONE = 1


class Refuses:
    """Pickles, but raises when it is loaded."""

    def __init__(self, error: str = "ValueError") -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _raise, (self.error,)


def _raise(error: str) -> None:
    raise {"ValueError": ValueError, "SystemExit": SystemExit}[error](f"no {error}")


def through_frame(message: Order | Said) -> Order | Said:
    return unpack(b"".join(pack(message)))


def packed(*items: Any) -> PackedObjects:
    codec = PickleCodec()
    return codec.objects([codec.encode(item) for item in items])


def chunk_items(chunk: Order | Said) -> list[Any]:
    assert isinstance(chunk, Chunk)
    return [item for part in chunk.parts for item in PickleCodec().decode(part.block)]


# --- blocks --------------------------------------------------------------------------------------

POINTS = [Point(i, [i] * i) for i in range(5)]
BLOCKS: list[tuple[Codec, Block, list[Any]]] = [
    (PickleCodec(), packed(*POINTS), POINTS),
    (PickleCodec(), PickleCodec().scalars([1, "two", None, 3.0, b"4"]), [1, "two", None, 3.0, b"4"]),
    (ReferenceCodec(), ReferenceCodec().block(POINTS), POINTS),
]


@pytest.mark.parametrize(("codec", "block", "items"), BLOCKS, ids=["objects", "scalars", "references"])
def test_every_part_of_a_block_holds_the_items_of_that_part(
    codec: Codec, block: Block, items: list[Any]
) -> None:
    for low in range(len(items) + 1):
        for high in range(low, len(items) + 1):
            part = block.take(low, high)

            assert part.count == high - low
            assert codec.decode(part) == items[low:high]


@pytest.mark.parametrize(("codec", "block", "items"), BLOCKS, ids=["objects", "scalars", "references"])
def test_a_part_of_a_part_counts_from_its_own_start(codec: Codec, block: Block, items: list[Any]) -> None:
    inner = block.take(1, 4).take(1, 3)

    assert codec.decode(inner) == items[2:4]


def test_taking_parts_of_objects_copies_no_bytes() -> None:
    block = packed(*POINTS)

    part = block.take(1, 3)

    assert isinstance(part.body, memoryview)
    assert part.body.obj is block.body


def test_the_bytes_of_parts_add_up_to_those_of_the_block() -> None:
    block = packed(*POINTS)

    assert sum(block.take(i, i + 1).nbytes for i in range(5)) == block.nbytes > 0


def test_an_empty_block_of_scalars_has_no_items_and_no_division_by_zero() -> None:
    block = PickleCodec().scalars([])

    assert (block.count, block.take(0, 0).count, block.take(0, 0).nbytes) == (0, 0, 0)
    assert PickleCodec().decode(block) == []


def test_counted_items_have_a_number_and_no_bytes() -> None:
    assert (Counted(9).take(2, 7).count, Counted(9).nbytes) == (5, 0)


# --- codecs --------------------------------------------------------------------------------------


def test_an_object_arrives_as_it_was_when_it_was_encoded() -> None:
    codec = PickleCodec()
    changed: dict[str, int] = {}
    pieces = []
    for n in range(3):
        changed["n"] = n
        pieces.append(codec.encode(changed))

    assert codec.decode(codec.block(pieces)) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_something_that_is_no_scalar_after_all_arrives_with_its_type() -> None:
    codec = PickleCodec()

    items = codec.decode(codec.scalars([1, Number.ONE, True, Point(1, [])]))

    assert items == [1, Number.ONE, True, Point(1, [])]
    assert list(map(type, items)) == [int, Number, bool, Point]


def test_scalars_cost_one_pickle_for_all() -> None:
    numbers = list(range(1000))

    assert isinstance(PickleCodec().scalars(numbers), PackedScalars)
    assert PickleCodec().scalars(numbers).nbytes < 4 * 1000


@pytest.mark.parametrize("error", ["ValueError", "SystemExit"])
@pytest.mark.parametrize("places", [{0}, {2}, {4}, {0, 1}, {1, 3}, {0, 1, 2, 3, 4}])
def test_an_item_that_fails_to_load_is_alone_in_that(places: set[int], error: str) -> None:
    block = packed(*(Refuses(error) if i in places else i for i in range(5)))

    items = PickleCodec().decode(block)

    assert [i for i, item in enumerate(items) if isinstance(item, Undecodable)] == sorted(places)
    assert [item for item in items if not isinstance(item, Undecodable)] == [
        i for i in range(5) if i not in places
    ]
    assert all(f"no {error}" in str(item.error) for item in items if isinstance(item, Undecodable))


def test_an_item_that_fails_to_load_is_alone_in_that_in_a_part_too() -> None:
    block = packed("a", Refuses(), "b", Refuses(), "c").take(1, 5)

    kinds = [type(item) for item in PickleCodec().decode(block)]

    assert kinds == [Undecodable, str, Undecodable, str]


def test_by_reference_items_are_the_very_objects() -> None:
    codec, item = ReferenceCodec(), object()

    assert codec.decode(codec.block([codec.encode(item)]))[0] is item
    assert codec.size(item) == 0


# --- frames --------------------------------------------------------------------------------------

FAILURE = Failure(
    3, "error", "ValueError", "bad \ud83d", "Traceback…", True, 0.5, "int", "1", "1", b"pickled", b"item"
)
MESSAGES: list[Order | Said] = [
    Hello(4711),
    Bye(),
    Bye("Traceback (most recent call last)…"),
    Grant(12, 1024, 1 << 40),
    Answer(0, True),
    Answer(
        7,
        False,
        ((0, 3), (5, 9)),
        (1, 6),
        (FAILURE,),
        (),
        Totals(9, 2, 1, (3, 0)),
        0.25,
        True,
        ((0, None, 10.0), (-1, 0.5, None)),
    ),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_without_items_survives_its_frame(message: Order | Said) -> None:
    assert through_frame(message) == message


def test_a_chunk_survives_its_frame_with_what_the_worker_needs() -> None:
    objects = Part(40, packed(*POINTS).take(1, 4), 2, 3, ("a", "b", "c"))
    scalars = Part(90, PickleCodec().scalars(list(range(10))).take(2, 6))
    sent = Chunk(17, (objects, scalars), 7)

    got = through_frame(sent)

    assert isinstance(got, Chunk)
    assert (got.number, got.count, sum(part.block.count for part in got.parts)) == (17, 7, 7)
    assert [(p.first, p.attempt, p.delivery, p.keys) for p in got.parts] == [
        (40, 2, 3, ("a", "b", "c")),
        (90, 1, 1, None),
    ]
    assert chunk_items(got) == [*POINTS[1:4], 2, 3, 4, 5]


def test_a_block_that_came_in_a_frame_can_be_cut_and_sent_again() -> None:
    first = through_frame(Chunk(0, (Part(0, packed(*POINTS)),), 5))
    assert isinstance(first, Chunk)

    again = through_frame(Chunk(0, (first.parts[0].take(2, 5), first.parts[0].take(0, 1)), 4))

    assert chunk_items(again) == [*POINTS[2:5], POINTS[0]]


def test_the_outputs_of_an_answer_survive_with_their_parents_and_keys() -> None:
    parents = array("I", [0, 0, 4]).tobytes()
    sent = Answer(
        1,
        True,
        outputs=(
            Output(0, packed("a", "b", "c"), parents, ((1, ("x", ("!", "why"), "z")),)),
            Output(1, Counted(8)),
            Output(2, PickleCodec().scalars([5, 6])),
        ),
    )

    got = through_frame(sent)

    assert isinstance(got, Answer)
    one, two, three = got.outputs
    assert PickleCodec().decode(one.block) == ["a", "b", "c"]
    assert list(one.parent_indices() or ()) == [0, 0, 4]
    assert one.keys == ((1, ("x", ("!", "why"), "z")),)
    assert (two.route, two.block.count, two.parent_indices()) == (1, 8, None)
    assert PickleCodec().decode(three.block) == [5, 6]


def test_a_frame_tells_its_length_as_soon_as_its_prefix_is_whole() -> None:
    frame = b"".join(pack(Chunk(0, (Part(0, packed("x" * 100_000)),), 1)))

    assert frame_length(frame[: PREFIX.size - 1]) is None
    assert frame_length(frame[: PREFIX.size]) == len(frame) > 100_000
    assert frame_length(memoryview(frame)) == len(frame)


def test_what_is_no_frame_is_told_apart_from_an_unfinished_one() -> None:
    with pytest.raises(BrokenChannel, match="garbage"):
        frame_length(b"Hello from a job's print()")


def test_a_frame_is_written_without_copying_the_items() -> None:
    block = packed(*POINTS)

    buffers = pack(Chunk(0, (Part(0, block),), 5))

    assert any(buffer is block.body for buffer in buffers)


# --- parts ---------------------------------------------------------------------------------------


def test_a_part_of_a_part_keeps_numbers_keys_roots_and_tries() -> None:
    part = Part(10, PickleCodec().scalars([0, 1, 2, 3]), 2, 3, ("a", "b", "c", "d"), (7, 7, 8, 9))

    taken = part.take(1, 3)

    assert (taken.first, taken.attempt, taken.delivery) == (11, 2, 3)
    assert (taken.keys, taken.roots) == (("b", "c"), (7, 8))
    assert PickleCodec().decode(taken.block) == [1, 2]
    assert part.take(0, 4) is part


def test_a_failure_tells_its_text_even_if_its_exception_can_not_be_loaded() -> None:
    sent = Answer(
        0, True, failures=(Failure(0, "error", "E", "text", "tb", exception=pickle.dumps(Refuses())),)
    )

    got = through_frame(sent)

    assert isinstance(got, Answer)
    assert (got.failures[0].message, got.failures[0].exception) == ("text", pickle.dumps(Refuses()))
