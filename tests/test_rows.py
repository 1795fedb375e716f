"""Items whose values are all scalars leave together, and arrive as they were when they were given."""

from __future__ import annotations

import enum
import json
import math
import pickle
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from pydantic import BaseModel, Field

from jobq import Job, JobsFailed, Pipeline
from jobq.shapes import MOST_HEADS, MOST_NAMES, OFTEN, Keys, Shape, shape_of
from jobq.validation import Validator
from jobq.wire import (
    FEW_ROWS,
    WIDE_BYTES,
    Chunk,
    Codec,
    PackedObjects,
    PackedRows,
    Part,
    PickleCodec,
    Undecodable,
    pack,
    unpack,
)
from tests.test_work import Bench


@dataclass
class Point:
    x: Any
    y: Any


class Model(BaseModel):
    x: Any
    y: Any = None


class Text(str):
    __slots__ = ()


class Number(enum.IntEnum):
    ONE = 1


class Named(TypedDict):
    x: int
    y: str


SCALARS: list[Any] = [
    *(0, -1, 2**80, -(2**80), True, False),
    *(1.5, -0.0, math.inf, None),
    *("", "é\ud800\0", b"", b"\x93"),
]
MAKERS: list[Callable[[Any, Any], Any]] = [
    lambda x, y: {"x": x, "y": y},
    Point,
    lambda x, y: Model(x=x, y=y),
]
each_kind = pytest.mark.parametrize("make", MAKERS, ids=["dict", "dataclass", "model"])


def codec_for(item: Any) -> Codec:
    shape = Keys() if isinstance(item, dict) else shape_of(type(item))
    assert shape is not None
    return PickleCodec().shaped(shape)


def described(item: Any) -> Any:
    """Return all that makes an item what it is: classes, values, order, and which zero it is."""
    state = item if isinstance(item, dict) else vars(item)
    given = item.model_fields_set if isinstance(item, BaseModel) else None
    return type(item), [(type(k), k, type(v), repr(v)) for k, v in state.items()], given


@each_kind
def test_rows_arrive_as_they_were(make: Callable[[Any, Any], Any]) -> None:
    items = [make(x, y) for x in SCALARS for y in SCALARS]
    codec = codec_for(items[0])

    block = codec.block([codec.encode(item) for item in items])

    assert isinstance(block, PackedRows)
    assert [described(item) for item in codec.decode(block)] == [described(item) for item in items]


@each_kind
def test_an_item_that_changes_after_its_yield_arrives_as_it_was(make: Callable[[Any, Any], Any]) -> None:
    item = make(0, "")
    codec, pieces = codec_for(item), []
    for number in range(20):
        if isinstance(item, dict):
            item["x"] = number
        else:
            item.x = number
        pieces.append(codec.encode(item))

    items = codec.decode(codec.block(pieces))

    assert [described(one) for one in items] == [described(make(number, "")) for number in range(20)]
    assert len({id(one) for one in items}) == 20


@each_kind
def test_whatever_is_cut_out_of_a_block_is_its_items(make: Callable[[Any, Any], Any]) -> None:
    items = [make(number, f"{number:03}" * (number % 7)) for number in range(300)]
    codec = codec_for(items[0])
    whole = codec.block([codec.encode(item) for item in items])
    chance = random.Random(1)

    for _ in range(200):
        low, high = sorted(chance.sample(range(301), 2))
        part = whole.take(low, high)
        inner_low, inner_high = sorted((chance.randint(0, high - low), chance.randint(0, high - low)))
        for block, expected in (
            (part, items[low:high]),
            (part.take(inner_low, inner_high), items[low:high][inner_low:inner_high]),
        ):
            chunk = unpack(b"".join(pack(Chunk(0, (Part(0, block),), block.count))))
            assert isinstance(chunk, Chunk)
            arrived = codec.decode(chunk.parts[0].block)
            assert list(map(described, arrived)) == list(map(described, expected))


def test_a_cut_carries_few_of_its_neighbours() -> None:
    codec = codec_for({})
    whole = codec.block([codec.encode({"number": number}) for number in range(10_000)])
    assert isinstance(whole, PackedRows)

    one = whole.take(5_000, 5_001)

    assert len(one.body) < len(whole.body) / 100
    assert one.nbytes == pytest.approx(whole.nbytes / 10_000, abs=1)


def test_what_was_loaded_is_not_loaded_again() -> None:
    codec = codec_for({})
    whole = codec.block([codec.encode({"number": number}) for number in range(100)])
    codec.decode(whole)
    assert isinstance(whole, PackedRows)

    part = whole.take(50, 60)

    assert part.rows is whole.rows
    assert codec.decode(part) == [{"number": number} for number in range(50, 60)]


OTHERS: list[Any] = [
    {"x": [1], "y": {"z": (2,)}},
    {},
    {"other": 1, "keys": 2},
    {"y": 1, "x": 2},
    {1: "a", None: "b", 2.5: "c"},
    {Text("x"): 1, "y": 2},
    {"x": Text("x"), "y": Number.ONE},
    OrderedDict(x=1, y=2),
    defaultdict(int, x=1),
    [1, 2],
    ({"x": 1},),
    "no dict",
    None,
]


@pytest.mark.parametrize("other", OTHERS, ids=repr)
def test_among_dicts_anything_arrives_as_it_was(other: Any) -> None:
    items = [{"x": number, "y": "row"} for number in range(20)]
    items.insert(10, other)
    codec = codec_for({})

    back = codec.decode(codec.block([codec.encode(item) for item in items]))

    assert list(map(repr, back)) == list(map(repr, items))
    assert type(back[10]) is type(other)
    if isinstance(other, dict):
        assert described(back[10]) == described(other)


def test_dicts_whose_keys_are_equal_but_of_another_class_keep_them() -> None:
    items: list[dict[str, int]] = [{"x": 1} for _ in range(10)] + [{Text("x"): 1} for _ in range(10)]
    codec = codec_for({})

    back = codec.decode(codec.block([codec.encode(item) for item in items]))

    assert [type(key) for item in back for key in item] == [str] * 10 + [Text] * 10


def test_dicts_with_other_keys_are_rows_of_their_own_block() -> None:
    codec = codec_for({})
    for keys in (("a", "b"), ("it's", '"', "{x}", "a\\", "new\nline", "class", "\ud800"), ("b", "a")):
        items = [dict.fromkeys(keys, number) for number in range(20)]

        block = codec.block([codec.encode(item) for item in items])

        assert isinstance(block, PackedRows)
        assert [described(item) for item in codec.decode(block)] == [described(item) for item in items]


@pytest.mark.parametrize(
    "items",
    [[{"x": 1}] * (FEW_ROWS - 1), [{}] * 20, [{"x": "long" * WIDE_BYTES}] * 20],
    ids=["few", "empty", "wide"],
)
def test_what_is_not_worth_it_is_pickled_item_by_item(items: list[Any]) -> None:
    codec = codec_for({})
    codec.block([codec.encode(item) for item in items])

    block = codec.block([codec.encode(item) for item in items])

    assert isinstance(block, PackedObjects)
    assert codec.decode(block) == items


def test_a_row_by_itself_can_be_taken_out_as_a_pickle() -> None:
    items = [Point(number, "y") for number in range(20)]
    codec = codec_for(items[0])
    block = codec.block([codec.encode(item) for item in items])

    part = block.take(7, 8)

    assert isinstance(part, PackedRows)
    assert pickle.loads(part.pickled()) == Point(7, "y")


def test_rows_of_a_class_that_is_not_there_are_said_to_be_undecodable() -> None:
    codec = PickleCodec().shaped(Shape(Point, ("x", "y"), b"no pickle", is_model=False))
    block = codec.block([codec.encode(Point(number, 0)) for number in range(20)])

    back = codec.decode(block)

    assert [type(one) for one in back] == [Undecodable] * 20
    assert codec.undecoded == 20


@pytest.mark.parametrize("backend", ["joinable", "sentinel", "pipe"])
@pytest.mark.usefixtures("no_leaks")
def test_rows_are_retried_and_become_dead_letters_as_they_came(backend: str) -> None:
    pipeline = Pipeline("rows")

    @pipeline.producer
    def rows() -> Iterator[Named]:
        row: Named = {"x": 0, "y": ""}
        for number in range(500):
            row["x"], row["y"] = number, str(number)
            yield row

    @pipeline.consumer(max_retries=1, min_backoff=0.0, workers=2)
    def point(row: Named, job: Job) -> Point:
        number = row["x"]
        row["x"] = -1  # what a job does to its item is not what its next try gets
        if number % 100 == 7 or (number % 3 == 0 and job.attempt == 1):
            raise ValueError(number)
        return Point(number, row["y"])

    with pytest.raises(JobsFailed) as caught:
        pipeline.run(backend=backend, collect=True)

    report = caught.value.report
    dead = [number for number in range(500) if number % 100 == 7]
    assert sorted((letter.item["x"], letter.item["y"]) for letter in report.dead) == [
        (n, str(n)) for n in dead
    ]
    assert sorted(point.x for point in report.results) == [n for n in range(500) if n not in dead]
    assert all(point.y == str(point.x) for point in report.results)


# --- validation by types that were seen when the rows were packed ---------------------------------


class Fields(TypedDict):
    x: int | None
    y: NotRequired[str]


class Positive(TypedDict):
    x: Annotated[int, Field(gt=0)]


def rows_of(*values: Any) -> list[dict[str, Any]]:
    """Return enough dicts for rows to leave together."""
    return [{"x": value} for value in values * 10]


def take_numbers(item: dict[str, int | str]) -> None: ...
def take_anything(item: dict[str, Any]) -> None: ...
def take_fields(item: Fields) -> None: ...
def take_positive(item: Positive) -> None: ...
def take_bounded(item: dict[str, Annotated[int, Field(gt=0)]]) -> None: ...
def take_literal(item: dict[str, Literal[1, 2]]) -> None: ...


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items were validated at a time."""
    counts: list[int] = []
    check = Validator.check

    def counting(validator: Validator, items: list[Any]) -> dict[int, str]:
        counts.append(len(items))
        return check(validator, items)

    monkeypatch.setattr(Validator, "check", counting)
    return counts


@pytest.mark.parametrize("function", [take_numbers, take_anything, take_fields])
def test_dicts_whose_types_were_found_right_are_not_looked_at_again(
    function: Callable[[Any], None], judged: list[int]
) -> None:
    with Bench(function, codec_for({})) as bench:
        for low in range(3):
            (answer,) = bench.do(*rows_of(low, low + 1))
            assert not answer.failures

        assert judged == [20]
        bench.do(*rows_of(None) if function is take_fields else rows_of("text"))
        assert judged == [20, 10], "other types, other dicts"
        bench.do(*rows_of(1, "text"))
        assert judged[2:] == [20], "mixed ones"


@pytest.mark.parametrize("function", [take_positive, take_bounded, take_literal])
def test_where_values_count_every_dict_is_looked_at(
    function: Callable[[Any], None], judged: list[int]
) -> None:
    with Bench(function, codec_for({})) as bench:
        (good,) = bench.do(*rows_of(1, 2))
        (bad,) = bench.do(*rows_of(1, -2))

    assert judged == [20, 20]
    assert not good.failures
    assert [failure.index for failure in bad.failures] == list(range(1, 20, 2))


@pytest.mark.parametrize("wrong", [2.5, None, b"", True], ids=repr)  # a bool is no number
def test_what_was_right_once_makes_nothing_else_right(wrong: Any) -> None:
    with Bench(take_numbers, codec_for({})) as bench:
        bench.do(*rows_of(1))
        bench.do(*rows_of("text"))
        (mixed,) = bench.do(*rows_of(1, wrong))
        (alike,) = bench.do(*rows_of(wrong))
        (again,) = bench.do(*rows_of(wrong))

    assert [failure.index for failure in mixed.failures] == list(range(1, 20, 2))
    assert len(alike.failures) == len(again.failures) == 10


def test_other_keys_are_other_dicts(judged: list[int]) -> None:
    with Bench(take_fields, codec_for({})) as bench:
        bench.do(*rows_of(1))
        (answer,) = bench.do(*[{"z": 1}] * 10)

    assert judged == [10, 10]
    assert len(answer.failures) == 10


def test_dicts_of_many_kinds_arrive_as_they_were() -> None:
    kinds: list[Any] = [1, 1.5, "a", b"b", True, None]
    items = [
        {f"k{number % 50}": kinds[number % 6], "other": kinds[number % 5]} for number in range(3 * MOST_HEADS)
    ]
    codec = codec_for({})

    arrived = codec.decode(codec.block([codec.encode(item) for item in items]))

    assert list(map(described, arrived)) == list(map(described, items))


class Name(str):
    """Equal to a key, and none."""

    __slots__ = ()


LIKE = [
    {"x": 1, "y": "a"},
    json.loads('{"x": 1, "y": "a"}'),
    {"y": "a", "x": 1},
    {"x": 1},
    {},
    {"x": 1, "y": "a", "z": None},
    {"x": True, "y": "a"},
    {"x": 1.0, "y": "a"},
    {"x": 1, "y": None},
    {"x": 1, "y": ["a"]},
    {"x": 1, "y": Name("a")},
    {"x": 1, Name("y"): "a"},
    {"x": 1, 2: "a"},
    OrderedDict(x=1, y="a"),
    ["x", "y"],
    "xy",
    None,
]


@pytest.mark.parametrize("like", LIKE, ids=repr)
def test_what_is_like_dicts_that_came_often_arrives_as_it_is(like: Any) -> None:
    codec = codec_for({})
    usual = [{"x": number, "y": str(number)} for number in range(3 * OFTEN)]

    pieces = [codec.encode(item) for item in usual]
    of_like = [codec.encode(like)] * FEW_ROWS
    arrived = codec.decode(codec.block(pieces[: 2 * OFTEN]))

    assert list(map(described, arrived)) == list(map(described, usual[: 2 * OFTEN]))
    for one in codec.decode(codec.block(of_like)):
        assert one == like
        assert type(one) is type(like)
        if isinstance(like, dict):
            assert [(type(k), k, type(v), v) for k, v in one.items()] == [
                (type(k), k, type(v), v) for k, v in like.items()
            ]


@pytest.mark.parametrize("count", [1, MOST_NAMES, MOST_NAMES + 1])
def test_long_dicts_that_come_often_arrive_as_they_were(count: int) -> None:
    items = [{f"k{place}": number for place in range(count)} for number in range(2 * OFTEN)]
    codec = codec_for({})

    arrived = codec.decode(codec.block([codec.encode(item) for item in items]))

    assert list(map(described, arrived)) == list(map(described, items))


def test_a_dict_that_came_often_is_as_it_was_at_its_yield() -> None:
    codec, item, pieces = codec_for({}), {"x": 0}, []
    for item["x"] in range(2 * OFTEN):
        pieces.append(codec.encode(item))

    assert codec.decode(codec.block(pieces)) == [{"x": number} for number in range(2 * OFTEN)]
