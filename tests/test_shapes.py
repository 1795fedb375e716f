"""Instances that travel as their fields' values arrive as they were."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import cached_property
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict, PrivateAttr, RootModel, create_model

from jobq import Job, JobsFailed, Pipeline
from jobq.shapes import Shape, builder, shape_of
from jobq.wire import PackedObjects, ShapedCodec, Undecodable


def dumps(item: Any) -> bytes:
    return pickle.dumps(item, protocol=5)


@dataclass
class Page:
    url: str
    links: list[str]
    size: float = 0.0
    kind: ClassVar[str] = "page"


@dataclass(frozen=True)
class Point:
    x: int
    y: int


@dataclass(kw_only=True)
class Prepared:
    text: str
    length: int = field(init=False)
    factor: InitVar[int] = 1

    def __post_init__(self, factor: int) -> None:
        self.length = len(self.text) * factor


@dataclass
class Node:
    name: str
    children: list[Node] = field(default_factory=list)
    parent: Node | None = None


@dataclass
class Longer(Page):
    note: str = ""


@dataclass
class Checked:
    _size: int = 0

    @property
    def size(self) -> int:
        return self._size


@dataclass
class Lazy:
    number: int

    @cached_property
    def double(self) -> int:
        return 2 * self.number


@dataclass(slots=True)
class Slotted:
    number: int


@dataclass
class Stateful:
    number: int

    def __getstate__(self) -> dict[str, int]:
        return {"number": self.number + 1}


@dataclass
class Reduced:
    number: int

    def __reduce__(self) -> tuple[Any, ...]:
        return Reduced, (self.number + 1,)


@dataclass
class Refusing:
    number: int

    def __setattr__(self, name: str, value: Any) -> None:
        if value == 13:
            raise ValueError("13 is not set here")
        super().__setattr__(name, value)


class Text(str):
    __slots__ = ()


class Model(BaseModel):
    name: str
    when: datetime
    price: Decimal = Decimal("1.5")
    tags: list[str] = []


class Child(Model):
    extra: int = 0


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str


class Private(BaseModel):
    name: str
    _secret: int = PrivateAttr(default=7)


class Tree(BaseModel):
    name: str
    parent: Tree | None = None


class Root(RootModel[list[int]]):
    pass


def state(item: Any) -> Any:
    """Return all that an instance holds, in order."""
    if not isinstance(item, BaseModel):
        return list(vars(item).items())
    whole = item.__getstate__()
    return {**whole, "__dict__": list(whole["__dict__"].items())}


def extended(item: Any) -> Any:
    item.added = "by somebody"
    return item


def family() -> Node:
    root = Node("root")
    root.children = [Node("a", parent=root), Node("b", parent=root)]
    return root


def looked_at() -> Lazy:
    lazy = Lazy(4)
    assert lazy.double == 8
    return lazy


NOON = datetime(2024, 5, 17, 12, tzinfo=UTC)

SHAPED: list[Callable[[], Any]] = [
    lambda: Page("http://here", ["a", "b"], 1.5),
    lambda: Page("of another kind", None, "text"),  # type: ignore[arg-type]  # what a field holds is its affair
    lambda: Point(1, -2),
    lambda: Prepared(text="abc", factor=3),
    lambda: Longer("u", [], 1.0, "n"),
    lambda: Checked(5),
    lambda: Lazy(3),
    looked_at,
    lambda: extended(Page("u", [])),
    lambda: Refusing(12),
    lambda: Model(name="n", when=NOON),
    lambda: Model(name="n", when=NOON, tags=["t"], price=Decimal(2)),
    lambda: Model.model_construct(name=3),
    lambda: Child(name="n", when=NOON, extra=3),
    lambda: Tree(name="leaf", parent=Tree(name="root")),
]


#: Names that mean something where the code that makes an instance is written, or could end a text there.
CURIOUS = [
    "made",
    "values",
    "new",
    "cls",
    "given",
    "v0",
    "it's",
    '"',
    "{x}",
    "a\\",
    "new\nline",
    "class",
    "é",
]
Curious = create_model(  # type: ignore[call-overload]  # names that no call could spell
    "Curious", __module__=__name__, **dict.fromkeys(CURIOUS, (int, 0))
)


class Lone(BaseModel):
    only: tuple[int, ...] = ()


def there_and_back(shape: Shape, item: Any) -> Any:
    codec = ShapedCodec(shape)
    [back] = codec.decode(codec.block([codec.encode(item)]))
    return back


@pytest.mark.parametrize("make", SHAPED)
def test_an_instance_arrives_as_pickle_brings_it(make: Callable[[], Any]) -> None:
    item = make()
    shape = shape_of(type(item))
    assert shape is not None

    back = there_and_back(shape, item)

    assert type(back) is type(item)
    assert state(back) == state(pickle.loads(dumps(item)))


@pytest.mark.parametrize("size", [1, 2, 100])
def test_most_instances_of_the_class_are_only_their_values(size: int) -> None:
    shape = shape_of(Page)
    assert shape is not None
    page = Page("u" * size, ["l"] * size)

    piece: Any = shape.encoder(dumps)(page)

    assert pickle.loads(piece) == ("u" * size, ["l"] * size, 0.0)


def test_an_instance_that_holds_itself_arrives_as_one() -> None:
    shape = shape_of(Node)
    assert shape is not None

    back = there_and_back(shape, family())

    assert all(child.parent is back for child in back.children)


def test_a_model_knows_which_fields_were_given() -> None:
    shape = shape_of(Model)
    assert shape is not None

    back = there_and_back(shape, Model(name="n", when=NOON))

    assert back.model_fields_set == {"name", "when"}
    assert back.model_dump(exclude_unset=True) == {"name": "n", "when": NOON}


def test_models_that_arrive_together_share_nothing() -> None:
    shape = shape_of(Model)
    assert shape is not None
    codec = ShapedCodec(shape)
    item = Model.model_construct(name="n", when=NOON, tags=[], price=Decimal(1))
    item.model_fields_set.update(Model.model_fields)
    pieces = [codec.encode(item) for _ in range(2)]

    one, other = codec.decode(codec.block(pieces))
    one.model_fields_set.clear()
    one.name = "changed"

    assert other == item
    assert other.model_fields_set == set(Model.model_fields)


def test_a_model_may_have_fields_of_any_name() -> None:
    shape = shape_of(Curious)
    assert shape is not None
    item = Curious.model_validate(dict.fromkeys(CURIOUS, 1))
    partial = Curious.model_validate({"made": 2})

    assert there_and_back(shape, item) == item
    assert there_and_back(shape, partial) == partial
    assert there_and_back(shape, partial).model_fields_set == {"made"}


def test_a_model_of_one_field_arrives_whatever_was_given() -> None:
    shape = shape_of(Lone)
    assert shape is not None

    given, kept = there_and_back(shape, Lone(only=(1, 2))), there_and_back(shape, Lone())

    assert (given.only, given.model_fields_set) == ((1, 2), {"only"})
    assert (kept.only, kept.model_fields_set) == ((), set())


def test_what_is_of_another_class_is_pickled_as_ever() -> None:
    shape = shape_of(Page)
    assert shape is not None
    longer = Longer("u", [], 1.0, "n")

    assert there_and_back(shape, longer) == longer
    assert there_and_back(shape, (1, 2, 3)) == (1, 2, 3)
    assert there_and_back(shape, [1]) == [1]
    assert there_and_back(shape, None) is None


@pytest.mark.parametrize("item", [Open(name="n", more=1), Private(name="n")], ids=["extra", "private"])  # type: ignore[call-arg]
def test_a_model_with_more_than_its_fields_keeps_it(item: BaseModel) -> None:
    shape = shape_of(type(item))
    back = there_and_back(shape, item) if shape is not None else pickle.loads(dumps(item))

    assert back == item
    assert back.__pydantic_private__ == item.__pydantic_private__
    assert back.__pydantic_extra__ == item.__pydantic_extra__


@pytest.mark.parametrize(
    "cls", [int, str, dict, Text, Slotted, Stateful, Reduced, list[int], Any, None, ValueError, object]
)
def test_other_classes_have_no_shape(cls: Any) -> None:
    assert shape_of(cls) is None


def test_a_class_that_has_no_name_to_be_found_by_has_no_shape() -> None:
    @dataclass
    class Local:
        number: int

    assert shape_of(Local) is None


def test_a_part_of_a_block_keeps_the_shape() -> None:
    shape = shape_of(Point)
    assert shape is not None
    codec = ShapedCodec(shape)
    block = codec.objects([dumps((i, i)) for i in range(10)])
    block.shape = shape.ref

    part = block.take(3, 5)

    assert codec.decode(part) == [Point(3, 3), Point(4, 4)]
    assert pickle.loads(part.take(0, 1).pickled()) == Point(3, 3)


def test_an_instance_of_a_class_that_is_not_there_is_said_to_be_undecodable() -> None:
    codec = ShapedCodec(Shape(Point, ("x", "y"), b"no pickle", is_model=False))

    block = PackedObjects(*_parts(codec, Point(1, 2)))

    [back] = codec.decode(block)
    assert isinstance(back, Undecodable)
    assert codec.undecoded == 1


def _parts(codec: ShapedCodec, item: Any) -> tuple[Any, ...]:
    block = codec.block([codec.encode(item)])
    assert isinstance(block, PackedObjects)
    return block.body, block.ends, block.base, block.shape


def test_the_same_shape_is_built_once() -> None:
    shape = shape_of(Point)
    assert shape is not None

    assert builder(shape.ref) is builder(shape.ref)


@pytest.mark.parametrize("backend", ["joinable", "sentinel", "pipe"])
@pytest.mark.usefixtures("no_leaks")
def test_typed_items_go_through_a_pipeline_and_into_dead_letters(backend: str) -> None:
    pipeline = Pipeline("shapes")

    @pipeline.producer
    def pages() -> Iterator[Page]:
        yield from (Page(f"u{i}", [str(i)]) for i in range(50))

    @pipeline.consumer
    def point(page: Page, job: Job) -> Point:
        if page.url == "u7":
            raise ValueError(job.id)
        return Point(int(page.url[1:]), len(page.links))

    with pytest.raises(JobsFailed) as caught:
        pipeline.run(backend=backend, collect=True)

    assert sorted(caught.value.report.results, key=lambda p: p.x) == [
        Point(i, 1) for i in range(50) if i != 7
    ]
    assert [letter.item for letter in caught.value.report.dead] == [Page("u7", ["7"])]
