"""What annotations say, who takes whose items, and whether an item is of its type."""
# Functions here are there for their annotations, and old spellings are among what is tested.
# ruff: noqa: ARG001, ARG002, ARG003, UP045, PYI061
# mypy: disable-error-code="empty-body"

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import functools
import re
import sys
import typing
from collections import abc
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Optional,
    Protocol,
    TypedDict,
    TypeVar,
    Union,
    runtime_checkable,
)

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import BaseModel, Field, PositiveInt, SecretStr, field_validator
from typing_extensions import TypeAliasType
from typing_extensions import TypedDict as ExtendedTypedDict

from jobq.annotations import EMPTY, Signature, accepts, read_signature, spell
from jobq.stage import ConsumerOptions, Job, ProducerOptions, Resource, Shard, Stage, locate
from jobq.validation import Router, Validator, read_parameter

if TYPE_CHECKING:
    from decimal import Decimal as Hidden

T = TypeVar("T")
N = TypeVar("N", int, str)
B = TypeVar("B", bound=int)


class Page(BaseModel):
    url: str
    size: int = 0


class LongPage(Page):
    text: str = ""


class Plain:
    pass


class Loud(Plain):
    def shout(self) -> str:
        return "!"


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


@dataclass
class Line:
    price: float
    note: str | None = None


@dataclass
class Invoice:
    lines: list[Line]
    kids: list[Invoice] = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    size: int


@dataclass
class Box(Generic[T]):
    content: T


class Pages(list[Page]):
    pass


class Row(TypedDict):
    x: int
    y: NotRequired[str]


class WideRow(Row):
    z: float


class NewRow(ExtendedTypedDict):
    x: int


class Point(NamedTuple):
    x: int
    y: int


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Shouts(Protocol):
    def shout(self) -> str: ...


@runtime_checkable
class CanShout(Protocol):
    def shout(self) -> str: ...


class HasName(Protocol):
    name: str


UserId = NewType("UserId", int)
PageList = TypeAliasType("PageList", list[Page])
Documents = TypeAliasType("Documents", Invoice | Page)
Json = TypeAliasType("Json", "dict[str, Json] | list[Json] | str | int | None")


def consumer(function: Callable[..., Any], **options: Any) -> Signature:
    return read_signature(
        Stage("it", "consumer", function, ConsumerOptions(**options), location=locate(function))
    )


def producer(function: Callable[..., Any]) -> Signature:
    return read_signature(Stage("it", "producer", function, ProducerOptions(), location=locate(function)))


def consumer_of(annotation: Any, **options: Any) -> Signature:
    def take(item: Any) -> None: ...

    take.__annotations__["item"] = annotation
    return consumer(take, **options)


def consumer_giving(annotation: Any) -> Signature:
    def give(item: int) -> Any: ...

    give.__annotations__["return"] = annotation
    return consumer(give)


def producer_giving(annotation: Any) -> Signature:
    def give() -> Any: ...

    give.__annotations__["return"] = annotation
    return producer(give)


# ── the item ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (Page, Page),
        ("Page", Page),
        ("list[Page]", list[Page]),
        (list["Page"], list[Page]),
        (Annotated[int, "pages"], Annotated[int, "pages"]),
        ("Invoice | Page", Invoice | Page),
        (Union["Invoice", Page], Union[Invoice, Page]),  # noqa: UP007  # the old spelling
        (Any, Any),
        (UserId, UserId),
        (np.ndarray, np.ndarray),
        ("npt.NDArray[np.float64]", npt.NDArray[np.float64]),
    ],
)
def test_the_item_is_of_the_annotated_type(annotation: Any, expected: Any) -> None:
    signature = consumer_of(annotation)

    assert (signature.item, signature.item_type, signature.problems) == ("item", expected, ())
    assert signature.item_known


def test_the_item_is_the_first_parameter_that_is_no_job() -> None:
    def take(job: Job, page: Page, db: str = "x") -> None: ...

    signature = consumer(take)

    assert (signature.item, signature.item_first) == ("page", False)
    assert [(b.name, b.kind, b.default) for b in signature.bindings] == [
        ("job", "job", EMPTY),
        ("db", "free", "x"),
    ]


def test_an_item_may_be_positional_only_when_it_comes_first() -> None:
    def first(page: Page, /, job: Job) -> None: ...
    def second(job: Job, page: Page, /) -> None: ...

    assert consumer(first).problems == ()
    assert consumer(first).item_first
    assert any("positional-only" in problem for problem in consumer(second).problems)


def test_a_keyword_only_item_is_not_passed_by_position() -> None:
    def take(*, page: Page) -> None: ...

    assert (consumer(take).item, consumer(take).item_first) == ("page", False)


def test_a_positional_only_parameter_without_default_is_a_problem() -> None:
    def take(page: Page, db: str, cache: str = "", /) -> None: ...

    (problem,) = consumer(take).problems

    assert "parameter db is positional-only" in problem


def test_star_arguments_are_no_parameters() -> None:
    def take(page: Page, *args: int, **options: int) -> None: ...

    assert consumer(take).bindings == ()


def test_a_consumer_without_item_is_a_problem() -> None:
    def take(job: Job) -> None: ...

    assert "takes no item" in consumer(take).problems[0]


def test_an_item_without_annotation_is_a_problem() -> None:
    def take(page): ...  # type: ignore[no-untyped-def]

    signature = consumer(take)

    assert "page, the item, has no annotation" in signature.problems[0]
    assert not signature.item_known


@pytest.mark.parametrize(
    "annotation", [Optional[Page], "Page | None", None, Literal["a", None], "int | str | None"]
)
def test_an_item_that_accepts_none_is_a_problem(annotation: Any) -> None:
    assert "accepts None" in consumer_of(annotation).problems[0]


@pytest.mark.parametrize("annotation", [Any, object, "T"])
def test_an_item_that_may_be_anything_is_fine(annotation: Any) -> None:
    assert consumer_of(annotation).problems == ()


@pytest.mark.parametrize("annotation", ["Hidden", "list[Hidden]", "Page |"])
def test_an_item_whose_annotation_cannot_be_read_is_a_problem(annotation: str) -> None:
    (problem,) = consumer_of(annotation).problems

    assert repr(annotation) in problem
    assert "TYPE_CHECKING" in problem


def test_an_annotation_that_matters_nowhere_may_be_unreadable() -> None:
    def take(page: Page, db: Hidden, path: Hidden | None = None) -> None: ...

    signature = consumer(take)

    assert signature.problems == ()
    assert [(b.name, b.annotation) for b in signature.bindings] == [("db", EMPTY), ("path", EMPTY)]


def test_job_and_shard_are_known_even_if_imported_for_type_checking_only() -> None:
    namespace: dict[str, Any] = {"Page": Page}
    exec("def take(job: 'Job', page: Page): ...\ndef give(s: 'jobq.Shard') -> list[Page]: ...", namespace)

    assert consumer(namespace["take"]).item == "page"
    assert producer(namespace["give"]).bindings[0].kind == "shard"


@pytest.mark.parametrize("annotation", [Shard, "Shard", Optional[Shard], Annotated[Shard, "mine"]])
def test_a_shard_is_known_by_its_annotation(annotation: Any) -> None:
    def give(part: Any) -> list[Page]: ...

    give.__annotations__["part"] = annotation

    assert producer(give).bindings[0].kind == "shard"


def test_types_that_are_local_to_the_running_call_are_found() -> None:
    class Local: ...

    class Other: ...

    def take(item: Local) -> Other: ...

    signature = consumer(take)

    assert (signature.item_type, signature.outputs) == (Local, (Other,))


def test_types_in_a_closure_are_found_after_the_call_has_ended() -> None:
    def declare() -> Callable[..., Any]:
        class Local: ...

        def take(item: Local) -> None:
            print(Local)

        return take

    assert consumer(declare()).item_type.__name__ == "Local"


def test_a_wrapped_function_is_read_by_what_it_wraps() -> None:
    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            return function(*args, **options)

        return call

    @logged
    def take(page: Page, db: str) -> Iterator[Line]: ...

    signature = consumer(take)

    assert (signature.item_type, signature.outputs, signature.many) == (Page, (Line,), True)
    assert [b.name for b in signature.bindings] == ["db"]


def test_a_partial_is_read_without_what_it_binds() -> None:
    def take(db: str, page: Page, size: int) -> Line: ...

    signature = consumer(functools.partial(take, "x", size=3))

    assert (signature.item, signature.item_type, signature.outputs) == ("page", Page, (Line,))
    assert [(b.name, b.default) for b in signature.bindings] == [("size", 3)]


def test_a_callable_object_and_a_method_are_read_by_their_call() -> None:
    class Take:
        def __call__(self, page: Page) -> Line: ...
        def other(self, page: Page) -> Iterator[Line]:
            yield Line(1)

    for function, many in ((Take(), False), (Take().other, True)):
        signature = consumer(function)
        assert (signature.item_type, signature.outputs, signature.many) == (Page, (Line,), many)


def test_a_class_gives_its_instances() -> None:
    signature = consumer(Named)

    assert (signature.item, signature.item_type, signature.outputs) == ("name", str, (Named,))


@pytest.mark.parametrize("function", [dict, max, print, functools.partial(print, "x")])
def test_a_builtin_is_read_or_refused_but_never_crashes(function: Callable[..., Any]) -> None:
    assert consumer(function).problems


# ── batches ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [("list[Page]", Page), (list, Any), (Sequence[int], int), ("list[int | str]", int | str)],
)
def test_the_item_of_a_batch_is_what_its_list_holds(annotation: Any, expected: Any) -> None:
    signature = consumer_of(annotation, batch=10)

    assert (signature.item_type, signature.batched, signature.problems) == (expected, True, ())


@pytest.mark.parametrize("annotation", ["Page", "dict[str, Page]", "set[Page]", "list[Page] | Page"])
def test_a_batch_that_is_no_list_is_a_problem(annotation: str) -> None:
    assert (
        f"batch=10, but its parameter item is annotated {annotation}"
        in consumer_of(annotation, batch=10).problems[0]
    )


def test_a_batch_whose_items_may_be_none_is_a_problem() -> None:
    assert "accepts None" in consumer_of("list[Page | None]", batch=10).problems[0]


# ── what is given ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("annotation", "outputs", "nullable", "many"),
    [
        (Page, (Page,), False, False),
        ("Page", (Page,), False, False),
        ("Page | None", (Page,), True, False),
        (Optional[Page], (Page,), True, False),
        ("Page | Line", (Page, Line), False, False),
        ("Page | Line | Page | None", (Page, Line), True, False),
        ("Annotated[Page | Line, 'x']", (Page, Line), False, False),
        ("Documents", (Invoice, Page), False, False),
        ("list[Page]", (list[Page],), False, False),
        ("tuple[Page, Line]", (tuple[Page, Line],), False, False),
        ("Iterator[Page]", (Page,), False, True),
        ("Iterator[Page | None]", (Page,), True, True),
        ("Iterator[Page] | None", (Page,), True, True),
        ("Iterator[Page | Line]", (Page, Line), False, True),
        ("Iterator[Page] | Iterator[Line]", (Page, Line), False, True),
        ("Annotated[Iterator[Page], 'x']", (Page,), False, True),
        ("abc.Iterable[Page]", (Page,), False, True),
        ("typing.Iterable[Page]", (Page,), False, True),
        ("abc.Generator[Page, None, None]", (Page,), False, True),
        ("AsyncIterator[Page]", (Page,), False, True),
        ("abc.AsyncGenerator[Page, None]", (Page,), False, True),
        ("Iterator[list[Page]]", (list[Page],), False, True),
        ("Iterator", (Any,), False, True),
        ("Any", (Any,), False, False),
    ],
)
def test_a_consumer_gives_what_it_is_annotated_with(
    annotation: Any, outputs: tuple[Any, ...], nullable: bool, many: bool
) -> None:
    signature = consumer_giving(annotation)

    assert (signature.outputs, signature.nullable, signature.many) == (outputs, nullable, many)
    assert (signature.gives, signature.problems) == (True, ())


@pytest.mark.parametrize("annotation", [None, EMPTY, typing.NoReturn, typing.Never, "None", "Iterator[None]"])
def test_a_consumer_may_give_nothing(annotation: Any) -> None:
    def end(item: int) -> Any: ...

    del end.__annotations__["return"]
    signature = consumer(end) if annotation is EMPTY else consumer_giving(annotation)

    assert (signature.gives, signature.outputs, signature.problems) == (False, (), ())


@pytest.mark.parametrize(
    ("annotation", "outputs"),
    [
        ("Iterator[Page]", (Page,)),
        ("abc.Iterable[Page | Line | None]", (Page, Line)),
        ("abc.Generator[Page, None, None]", (Page,)),
        ("AsyncIterator[Page]", (Page,)),
        ("list[Page]", (Page,)),
        ("typing.List[Page]", (Page,)),
        ("set[Page]", (Page,)),
        ("frozenset[Page]", (Page,)),
        ("tuple[Page, ...]", (Page,)),
        ("tuple[Page, Line]", (Page, Line)),
        ("Sequence[list[Page]]", (list[Page],)),
        ("collections.deque[Page]", (Page,)),
        ("list", (Any,)),
        ("PageList", (Page,)),
        ("list[Page] | None", (Page,)),
    ],
)
def test_a_producer_gives_the_elements(annotation: Any, outputs: tuple[Any, ...]) -> None:
    signature = producer_giving(annotation)

    assert (signature.outputs, signature.many, signature.problems) == (outputs, True, ())


@pytest.mark.parametrize("annotation", ["Page", "str", "dict[str, Page]", None, "list[Page] | Page"])
def test_a_producer_that_does_not_give_many_is_a_problem(annotation: Any) -> None:
    signature = producer_giving(annotation)

    assert "is a producer but is annotated" in signature.problems[0]
    assert "Iterable[" in signature.problems[0]


def test_a_producer_without_annotation_is_a_problem() -> None:
    def give():  # type: ignore[no-untyped-def]
        yield 1

    assert "it yields but has no return annotation" in producer(give).problems[0]


@pytest.mark.parametrize("annotation", ["Page", "list[Page]", None])
def test_a_consumer_that_yields_must_be_annotated_so(annotation: Any) -> None:
    def take(item: int) -> Any:
        yield item

    take.__annotations__["return"] = annotation

    assert "it yields but is annotated" in consumer(take).problems[0]


def test_a_consumer_that_yields_without_annotation_is_a_problem() -> None:
    def take(item: int):  # type: ignore[no-untyped-def]
        yield item

    assert "has no return annotation" in consumer(take).problems[0]


@pytest.mark.parametrize("kind", ["producer", "consumer"])
def test_an_unreadable_return_annotation_is_a_problem(kind: str) -> None:
    signature = producer_giving("Iterator[Hidden]") if kind == "producer" else consumer_giving("Hidden")

    assert "of what it gives can't be read" in signature.problems[0]


def test_async_functions_and_generators_are_known() -> None:
    async def wait(item: int) -> Page: ...
    async def stream(item: int) -> AsyncIterator[Page]:
        yield Page(url="")

    def plain(item: int) -> Page: ...
    def steps(item: int) -> Iterator[Page]:
        yield Page(url="")

    def handed(item: int) -> AsyncIterator[Page]:
        return stream(item)

    found = [
        (s.is_async, s.is_generator, s.many) for s in map(consumer, (wait, stream, plain, steps, handed))
    ]

    assert found == [
        (True, False, False),
        (True, True, True),
        (False, False, False),
        (False, True, True),
        (True, True, True),
    ]


def test_a_partial_of_an_async_function_is_async() -> None:
    async def wait(item: int, n: int) -> Page: ...

    assert consumer(functools.partial(wait, n=1)).is_async


def test_a_resource_may_be_annotated_in_any_way() -> None:
    def db(path: str = "x", cache: Hidden | None = None) -> Iterator[Hidden]:
        yield  # type: ignore[misc]  # nobody looks at it

    signature = read_signature(Resource("db", db))

    assert (signature.problems, signature.is_generator, signature.item) == ((), True, None)
    assert [b.name for b in signature.bindings] == ["path", "cache"]


def test_type_parameters_and_aliases_of_newer_syntax_are_read() -> None:
    if sys.version_info < (3, 12):
        pytest.skip("the syntax is Python 3.12's")
    namespace: dict[str, Any] = {"Page": Page, "Line": Line}
    exec("type Doc = Page | Line\ntype Pair[T] = tuple[T, T]", namespace)
    exec("def take[T](item: Doc, other: T = 1) -> Pair[int]: ...\ndef any[T](item: T) -> T: ...", namespace)

    signature = consumer(namespace["take"])

    assert signature.problems == ()
    assert accepts(signature.item_type, Line)
    assert not accepts(signature.item_type, int)
    assert accepts(tuple[int, int], signature.outputs[0])
    assert not accepts(tuple[str, str], signature.outputs[0])
    assert consumer(namespace["any"]).problems == ()


# ── who takes what ───────────────────────────────────────────────────────────

TAKEN: list[tuple[Any, Any]] = [
    (Page, Page),
    (Page, LongPage),
    (Plain, Loud),
    (Any, Page),
    (object, Page),
    (Page, Any),
    (int, Level),
    (float, int),
    (float, float),
    (complex, int),
    (bool, bool),
    (object, bool),
    (dt.date, dt.datetime),
    (list[Page], list[Page]),
    (list[Page], list[LongPage]),
    (list[Any], list[Page]),
    (list, list[Page]),
    (list[Page], list),
    (Sequence[Page], list[Page]),
    (abc.Iterable[float], list[int]),
    (Sequence[int], tuple[int, ...]),
    (Sequence[int], tuple[int, int]),
    (tuple[int, ...], tuple[int, int]),
    (tuple[int, float], tuple[int, int]),
    (tuple, Point),
    (dict[str, Any], dict[str, int]),
    (Mapping[str, float], dict[str, int]),
    (list[Page], Pages),
    (int | str, int),
    (int | str, int | str),
    (list[int | str], list[int]),
    (Page | None, Page),
    (typing.List[Page], list[Page]),  # noqa: UP006  # the old spelling
    (Annotated[int, Field(gt=0)], int),
    (int, Annotated[int, Field(gt=0)]),
    (Literal["a", "b"], Literal["a"]),
    (str, Literal["a"]),
    (UserId, UserId),
    (int, UserId),
    (float, UserId),
    (Row, Row),
    (Row, WideRow),
    (NewRow, Row),
    (dict, Row),
    (dict[str, Any], Row),
    (Mapping[str, object], Row),
    (Shouts, Loud),
    (CanShout, Loud),
    (HasName, Named),
    (HasName, HasName),
    (abc.Sized, Pages),
    (abc.Hashable, str),
    (Box[int], Box[int]),
    (Box, Box[int]),
    (Box[float], Box[int]),
    (Box[Any], Box[int]),
    (PageList, list[Page]),
    (Documents, Page),
    (T, Page),
    (B, int),
    (N, str),
    (np.ndarray, npt.NDArray[np.float64]),
    (npt.NDArray[np.float64], np.ndarray),
    (npt.NDArray[np.float64], npt.NDArray[np.float64]),
    (npt.NDArray[Any], npt.NDArray[np.float64]),
    (npt.NDArray[np.floating[Any]], npt.NDArray[np.float64]),
    (Callable[[int], str], Callable[[int], str]),
    (Callable[..., Any], Callable[[int], str]),
    (type[Plain], type[Loud]),
    (Color, Literal[Color.RED]),
    (bytes, bytes),
]

REFUSED: list[tuple[Any, Any]] = [
    (Page, Plain),
    (LongPage, Page),
    (int, str),
    (int, float),
    (int, bool),
    (bool, int),
    (float, str),
    (str, bytes),
    (list[Page], list[Plain]),
    (list[LongPage], list[Page]),
    (list[Page], Page),
    (Page, list[Page]),
    (list[int], Sequence[int]),
    (tuple[int, int], tuple[int, ...]),
    (tuple[int, int], tuple[int]),
    (dict[str, int], dict[str, str]),
    (list[Plain], Pages),
    (int | str, bytes),
    (list[int], list[int | str]),
    (Literal["a"], Literal["a", "b"]),
    (Literal["a"], str),
    (Literal[1], Literal[True]),
    (UserId, int),
    (WideRow, Row),
    (Row, dict[str, Any]),
    (dict[str, int], Row),
    (Shouts, Plain),
    (HasName, Plain),
    (Shouts, Row),
    (Box[str], Box[int]),
    (PageList, list[Plain]),
    (Documents, Plain),
    (B, str),
    (N, bytes),
    (npt.NDArray[np.int64], npt.NDArray[np.float64]),
    (npt.NDArray[np.float64], list[float]),
    (Color, Level),
]


def names(pair: Any) -> str:
    """Return the id of a parameter: the same in every process, wherever objects lie."""
    spelled = spell(pair) if not isinstance(pair, tuple) else "-".join(map(spell, pair))
    return re.sub(r" at 0x[0-9a-f]+", "", spelled)


@pytest.mark.parametrize(("taker", "given"), TAKEN, ids=names)
def test_a_type_is_taken(taker: Any, given: Any) -> None:
    assert accepts(taker, given)


@pytest.mark.parametrize(("taker", "given"), REFUSED, ids=names)
def test_a_type_is_not_taken(taker: Any, given: Any) -> None:
    assert not accepts(taker, given)


@pytest.mark.parametrize("odd", [5, [int], {"a": 1}, ..., "text", Literal[1], None])
def test_an_odd_annotation_is_judged_without_a_crash(odd: Any) -> None:
    assert not accepts(odd, Page)
    assert not accepts(Page, odd)
    assert accepts(odd, odd)


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (Page, "Page"),
        (list[Page], "list[Page]"),
        (Invoice | Page, "Invoice | Page"),
        (Optional[Page], "Page | None"),
        (dict[str, list[int]], "dict[str, list[int]]"),
        (tuple[int, ...], "tuple[int, ...]"),
        (Annotated[int, Field(gt=0)], "int"),
        (Literal["a", 1], "Literal['a', 1]"),
        (Any, "Any"),
        (None, "None"),
        (Callable[[int], str], "Callable[[int], str]"),
        (UserId, "UserId"),
        (T, "T"),
        (PageList, "PageList"),
        ("Page", "Page"),
        (Box[int], "Box[int]"),
        (5, "5"),
    ],
)
def test_an_annotation_is_spelled_as_one_would_write_it(annotation: Any, expected: str) -> None:
    assert spell(annotation) == expected


# ── judging items ────────────────────────────────────────────────────────────

FITTING: list[tuple[Any, Any]] = [
    (int, 1),
    (int, Level.LOW),
    (float, 1),
    (float, 1.5),
    (str, "a"),
    (bool, True),
    (Any, None),
    (object, 3),
    (Page, Page(url="")),
    (Page, LongPage(url="")),
    (Page, Page.model_construct(url=3)),  # instances of models are trusted
    (list[Page], [Page.model_construct(url=3)]),
    (Plain, Loud()),
    (dt.date, dt.datetime(2024, 1, 1, tzinfo=dt.UTC)),
    (Color, Color.RED),
    (Line, Line(1, None)),
    (Invoice, Invoice([Line(1.5, "a")], [Invoice([])])),
    (Slotted, Slotted(1)),
    (Box[int], Box(1)),
    (Row, {"x": 1}),
    (Row, {"x": 1, "y": "a", "other": 1}),
    (NewRow, {"x": 1}),
    (Point, Point(1, 2)),
    (list[int], [1, Level.LOW]),
    (list[float], [1, 2.0]),
    (list, [1, "a"]),
    (dict[str, list[int]], {"a": [1]}),
    (collections.defaultdict[str, int], collections.defaultdict(int, a=1)),
    (collections.Counter[str], collections.Counter("ab")),
    (Mapping[str, int], {"a": 1}),
    (Sequence[int], (1, 2)),
    (Sequence[int], [1, 2]),
    (set[int], {1}),
    (frozenset[int], frozenset({1})),
    (tuple[int, ...], (1, 2)),
    (tuple[int, str], (1, "a")),
    (tuple[()], ()),
    (int | str, "a"),
    (list[int | None], [1, None]),
    (Literal["a", 1], "a"),
    (UserId, 1),
    (Annotated[int, Field(gt=0)], 1),
    (Annotated[list[Line], Field(min_length=1)], [Line(1)]),
    (PositiveInt, 1),
    (SecretStr, SecretStr("x")),
    (Shouts, 5),  # can't be asked at run time
    (CanShout, Loud()),
    (T, 1),
    (B, 1),
    (PageList, [Page(url="")]),
    (Json, {"a": [{"b": None}, "c", 1]}),
    (np.ndarray, np.zeros(2)),
    (npt.NDArray[np.float64], np.zeros(2)),
    (Callable[[int], str], str),
    (type[Plain], Loud),
    (abc.Iterator[int], iter("abc")),
    (abc.Sized, [1]),
]

FAILING: list[tuple[Any, Any, str]] = [
    (int, "1", "Input should be an instance of int; got str '1'"),
    (int, True, "Input should be an instance of int; got bool True"),
    (int, 1.0, "Input should be an instance of int; got float 1.0"),
    (float, "1", "Input should be an instance of float; got str '1'"),
    (float, True, "Input should be an instance of float; got bool True"),
    (str, b"a", "Input should be an instance of str"),
    (bool, 1, "Input should be an instance of bool"),
    (Page, {"url": ""}, "Input should be an instance of Page; got dict {'url': ''}"),
    (Page, None, "Input should be an instance of Page; got None"),
    (Plain, 1, "Input should be an instance of Plain; got int 1"),
    (Line, Line("x"), "field 'price': Input should be a valid number; got str 'x'"),  # type: ignore[arg-type]
    (Line, Line(1, 2), "field 'note': Input should be a valid string; got int 2"),  # type: ignore[arg-type]
    (Line, Plain(), "Input should be an instance of Line"),
    (Invoice, Invoice([Line(1), Line("x")]), "field 'lines.1.price'"),  # type: ignore[arg-type]
    (Invoice, Invoice([], [Invoice([3])]), "field 'kids.0.lines.0': Input should be an instance of Line"),  # type: ignore[list-item]
    (Slotted, Slotted("x"), "field 'size': Input should be a valid integer; got str 'x'"),  # type: ignore[arg-type]
    (Box[int], Box("x"), "field 'content': Input should be a valid integer"),
    (list[Line], [Line("x")], "field '0.price'"),  # type: ignore[arg-type]
    (Row, {}, "field 'x': Field required"),
    (Row, {"x": "1"}, "field 'x': Input should be a valid integer; got str '1'"),
    (Row, {"x": 1, "y": 2}, "field 'y': Input should be a valid string; got int 2"),
    (NewRow, {"x": 1.5}, "field 'x'"),
    (Row, [1], "Input should be a valid dictionary"),
    (Point, Point("a", 2), "field 'x': Input should be a valid integer"),  # type: ignore[arg-type]
    (Point, (1, 2), "Input should be an instance of Point"),
    (list[int], [1, "a"], "field '1': Input should be a valid integer; got str 'a'"),
    (list[int], (1,), "Input should be a valid list"),
    (dict[str, int], {"a": "b"}, "field 'a'"),
    (Mapping[str, int], {"a": "b"}, "field 'a'"),
    (Sequence[int], "ab", "Input should be a valid list"),
    (Sequence[int], (1, "a"), "field '1'"),
    (set[int], {"a"}, "Input should be a valid integer"),
    (tuple[int, str], (1, 2), "field '1'"),
    (int | str, 1.5, "Input should be int or str; got float 1.5"),
    (Literal["a"], "b", "Input should be 'a'"),
    (UserId, "a", "Input should be a valid integer"),
    (Annotated[int, Field(gt=0)], 0, "Input should be greater than 0"),
    (Annotated[list[Line], Field(min_length=1)], [], "at least 1 item"),
    (Annotated[list[Line], Field(min_length=1)], [Line("x")], "field '0.price'"),  # type: ignore[arg-type]
    (CanShout, Plain(), "Input should be an instance of CanShout"),
    (B, "a", "Input should be an instance of int"),
    (PageList, [1], "field '0': Input should be an instance of Page"),
    (Json, {"a": [1.5]}, "Input should be"),
    (np.ndarray, [1.0], "Input should be an instance of ndarray"),
    (npt.NDArray[np.float64], [1.0], "Input should be an instance of ndarray"),
    (abc.Sized, 1, "Input should be an instance of Sized"),
]


@pytest.mark.parametrize(("annotation", "item"), FITTING, ids=names)
def test_an_item_fits(annotation: Any, item: Any) -> None:
    assert Validator(annotation).check([item, item]) == {}


@pytest.mark.parametrize(("annotation", "item", "message"), FAILING, ids=names)
def test_an_item_does_not_fit_and_the_message_names_the_field(
    annotation: Any, item: Any, message: str
) -> None:
    problems = Validator(annotation).check([item])

    assert list(problems) == [0]
    assert message in problems[0]


def test_only_the_wrong_items_of_a_list_are_named() -> None:
    good, bad = Line(1), Line("x")  # type: ignore[arg-type]

    assert list(Validator(Line).check([good, bad, good, bad])) == [1, 3]
    assert list(Validator(int).check([1, "a", 2, "b"])) == [1, 3]


def test_items_are_left_as_they_are() -> None:
    items = [Invoice([Line(1)]), Invoice([Line(2)])]
    before = [dataclasses.asdict(item) for item in items]
    lines = items[0].lines

    Validator(Invoice).check(items)

    assert [dataclasses.asdict(item) for item in items] == before
    assert items[0].lines is lines
    assert type(lines[0].price) is int


def test_post_init_of_a_dataclass_is_not_run_again() -> None:
    runs = []

    @dataclass
    class Counted:
        size: int

        def __post_init__(self) -> None:
            runs.append(self.size)

    item = Counted(1)

    assert Validator(Counted).check([item]) == {}
    assert runs == [1]


def test_an_attribute_that_init_leaves_out_may_be_missing() -> None:
    @dataclass
    class Late:
        size: int = field(init=False)

    assert Validator(Late).check([Late()]) == {}


def test_many_problems_of_one_item_are_told_in_short() -> None:
    (message,) = Validator(list[int]).check([["x"] * 10]).values()

    assert message.endswith("; and 7 more")
    assert len(message) < 300


@pytest.mark.parametrize("error", [ValueError, RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_validator_that_raises_becomes_a_message(error: type[BaseException]) -> None:
    class Picky:
        @classmethod
        def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
            from pydantic_core import core_schema

            def judge(value: Any) -> Any:
                if value == "bad":
                    raise error("no such luck")
                return value

            return core_schema.no_info_plain_validator_function(judge)

    problems = Validator(Picky).check(["good", "bad", "good"])

    assert list(problems) == [1]
    assert "no such luck" in problems[1]


def test_a_repr_that_raises_does_no_harm() -> None:
    class Shy:
        def __repr__(self) -> str:
            raise RuntimeError

    assert "Shy" in Validator(int).check([Shy()])[0]


def test_validators_of_models_are_not_run_again() -> None:
    class Judged(BaseModel):
        size: int

        @field_validator("size")
        @classmethod
        def _never(cls, value: int) -> int:
            raise ValueError

    assert Validator(Judged).check([Judged.model_construct(size=1)]) == {}


@pytest.mark.parametrize("odd", [5, ..., "Unknown", Generic, typing.ClassVar])
def test_an_annotation_that_makes_no_schema_lets_everything_pass(odd: Any) -> None:
    assert Validator(odd).check([1, "a"]) == {}


# ── routing ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("declared", "item", "expected"),
    [
        ([Page, LongPage], LongPage(url=""), 1),
        ([Page, LongPage], Page(url=""), 0),
        ([object, Page, LongPage], LongPage(url=""), 2),
        ([Any, Page], Page(url=""), 1),
        ([Page, Any], 5, 1),
        ([int, bool], True, 1),
        ([bool, int], True, 0),
        ([bool, int], 1, 1),
        ([int, str], True, 0),
        ([float, str], 1, 0),
        ([float, int], 1, 1),
        ([int, float], 1.5, 1),
        ([list[int], list[str]], ["a"], 1),
        ([list[int], list[str]], [1], 0),
        ([list[int], list[str]], [1.5], -1),
        ([list[int], list[str], list], [1.5], 2),
        ([list, list[int]], [1], 1),
        ([Row, WideRow], {"x": 1, "z": 1.5}, 1),
        ([Row, WideRow], {"x": 1}, 0),
        ([dict, Row], {"x": 1}, 1),
        ([dict, Row], {"q": 1}, 0),
        ([str, Literal["a"]], "a", 1),
        ([str, Literal["a"]], "b", 0),
        ([Literal["a"], Literal["b"]], "b", 1),
        ([Line, Invoice], Invoice([]), 1),
        ([Line, Invoice], Page(url=""), -1),
        ([Box[int], Box[str]], Box("a"), 1),
        ([Point, tuple], Point(1, 2), 0),
        ([tuple, Point], Point(1, 2), 1),
        ([CanShout, int], Loud(), 0),
        ([CanShout, Loud], Loud(), 1),
        ([UserId, str], 5, 0),
        ([int, Annotated[int, Field(gt=10)]], 11, 1),
        ([int, Annotated[int, Field(gt=10)]], 5, 0),
        ([np.ndarray, list], np.zeros(1), 0),
        ([npt.NDArray[np.float64], str], np.zeros(1), 0),
        ([Plain, Loud, int], "x", -1),
        ([Level, int], Level.LOW, 0),
    ],
)
def test_an_item_goes_to_its_most_specific_type(declared: list[Any], item: Any, expected: int) -> None:
    router = Router(declared)

    assert [router.member(item), router.member(item)] == [expected, expected]


def test_items_of_one_class_are_told_apart_by_what_they_hold() -> None:
    router = Router([str, list[int], list[str]])

    assert [router.member(item) for item in ([1], ["a"], [1], "x", ["a"], [2.5])] == [1, 2, 1, 0, 2, -1]


def test_a_single_type_is_not_looked_at() -> None:
    assert Router([Page]).member("anything") == 0


# ── parameters ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("annotation", "text", "expected"),
    [
        (int, "3", 3),
        (float, "3", 3.0),
        (str, "3", "3"),
        (bool, "yes", True),
        (bool, "0", False),
        (int | None, "3", 3),
        (int | None, "null", None),
        (list[int], "[1, 2]", [1, 2]),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (Page, '{"url": "x"}', Page(url="x")),
        (Line, '{"price": 1}', Line(1.0)),
        (Literal["a"], "a", "a"),
        (dt.date, "2024-01-02", dt.date(2024, 1, 2)),
        (Any, "3", "3"),
        (EMPTY, "3", "3"),
        (Annotated[int, Field(gt=0)], "3", 3),
        (NewRow, '{"x": 1}', {"x": 1}),
        (Row, '{"x": 1}', {"x": 1}),
    ],
)
def test_a_text_is_read_as_the_annotated_type(annotation: Any, text: str, expected: Any) -> None:
    assert read_parameter(annotation, text, text=True) == expected


@pytest.mark.parametrize(
    ("annotation", "text", "message"),
    [
        (int, "x", "valid integer"),
        (list[int], "[1, 'a']", "JSON"),
        (list[int], '[1, "a"]', "field '1'"),
        (list[int], "x", "valid list"),
        (Page, "{}", "field 'url': Field required"),
        (Annotated[int, Field(gt=0)], "0", "greater than 0"),
        (Plain, "x", "instance of"),
        (Row, "{}", "field 'x'"),
    ],
)
def test_a_wrong_text_is_refused_with_a_message(annotation: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_parameter(annotation, text, text=True)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [(int, "3", 3), (list[int], ("1", 2), [1, 2]), (Line, {"price": 1}, Line(1.0)), (float, 1, 1.0)],
)
def test_a_value_is_converted_too(annotation: Any, value: Any, expected: Any) -> None:
    assert read_parameter(annotation, value, text=False) == expected


def test_an_object_of_an_unknown_class_is_handed_over_as_it_is() -> None:
    thing = Plain()

    assert read_parameter(Plain, thing, text=False) is thing
    with pytest.raises(ValueError, match="instance of"):
        read_parameter(Plain, 3, text=False)
