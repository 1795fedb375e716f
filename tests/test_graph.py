"""Who takes what each stage gives, and how everything that is wrong is told at once."""
# Functions here are there for their annotations.
# mypy: disable-error-code="empty-body"

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import pytest

from jobq.errors import PipelineError
from jobq.graph import (
    Edge,
    Graph,
    Route,
    bind,
    build_graph,
    find_by_name_problems,
    graph_parameters,
)
from jobq.stage import (
    ConsumerOptions,
    Function,
    Job,
    ProducerOptions,
    Resource,
    ResourceOptions,
    Shard,
    Stage,
)

T = TypeVar("T")


class Url: ...


class Link(Url): ...


class Page: ...


class Special(Page): ...


class Row: ...


class Box(Generic[T]): ...


def urls(root: str = "/") -> Iterator[Url]: ...
def more_urls() -> list[Url]: ...
def links() -> Iterator[Link]: ...
def urls_and_rows() -> Iterator[Url | Row]: ...
def numbers() -> Iterator[int]: ...
def fetch(url: Url) -> Page: ...
def crawl(url: Url) -> Iterator[Page | Link]: ...
def store(page: Page) -> None: ...
def index(page: Page) -> Row: ...
def write(row: Row) -> None: ...
def log(anything: Any) -> None: ...
def any_url(url: Url) -> None: ...
def page_or_row(item: Page | Row) -> None: ...


def named(function: Function, name: str | None) -> tuple[str, str]:
    return name or function.__name__, f"pipeline.py:{function.__code__.co_firstlineno}"


def P(function: Function, name: str | None = None, **options: Any) -> Stage:  # noqa: N802  # a short word here
    name, location = named(function, name)
    return Stage(name, "producer", function, ProducerOptions(**options), location=location)


def C(  # noqa: N802
    function: Function, *source: str | Function, name: str | None = None, **options: Any
) -> Stage:
    name, location = named(function, name)
    return Stage(name, "consumer", function, ConsumerOptions(**options), source, location)


def R(function: Function) -> Resource:  # noqa: N802
    return Resource(function.__name__, function, ResourceOptions(), named(function, None)[1])


def build(*declared: Stage | Resource, **options: Any) -> Graph:
    stages = [one for one in declared if isinstance(one, Stage)]
    resources = [one for one in declared if isinstance(one, Resource)]
    return build_graph(stages, resources, pipeline="crawl", **options)


def edges(graph: Graph) -> set[tuple[str, str | None]]:
    return {(edge.source, edge.target) for edge in graph.edges}


def problems(*declared: Stage | Resource, **options: Any) -> tuple[str, ...]:
    with pytest.raises(PipelineError) as caught:
        build(*declared, **options)
    return caught.value.problems


# ── the rule ─────────────────────────────────────────────────────────────────


def test_a_chain_follows_the_types() -> None:
    graph = build(P(urls), C(fetch), C(index), C(write))

    assert graph.edges == (Edge("urls", "fetch"), Edge("fetch", "index"), Edge("index", "write"))
    assert graph.nodes["write"].routes == ()


def test_what_nobody_takes_is_a_result() -> None:
    graph = build(P(urls), C(fetch))

    assert edges(graph) == {("urls", "fetch"), ("fetch", None)}
    assert graph.nodes["fetch"].routes == (Route(()),)


def test_a_lone_producer_gives_results() -> None:
    assert edges(build(P(urls))) == {("urls", None)}


def test_the_first_consumer_below_takes_the_items() -> None:
    graph = build(P(urls), C(fetch), P(more_urls), C(any_url))

    assert edges(graph) == {("urls", "fetch"), ("more_urls", "any_url"), ("fetch", None)}


def test_who_names_the_source_goes_before_who_does_not() -> None:
    graph = build(P(urls), P(more_urls), C(fetch), C(any_url, urls))

    assert edges(graph) == {("urls", "any_url"), ("more_urls", "fetch"), ("fetch", None)}


def test_all_that_name_the_source_take_every_item() -> None:
    graph = build(P(urls), C(fetch, urls), C(any_url, "urls"))

    assert graph.nodes["urls"].routes == (Route(("fetch", "any_url")),)
    assert edges(graph) == {("urls", "fetch"), ("urls", "any_url"), ("fetch", None)}


def test_several_producers_feed_one_consumer() -> None:
    graph = build(P(urls), P(more_urls), P(links), C(fetch))

    assert graph.sources_of("fetch") == ["urls", "more_urls", "links"]


def test_a_consumer_may_name_several_sources() -> None:
    graph = build(P(urls), P(numbers), C(log, "urls", numbers))

    assert graph.sources_of("log") == ["urls", "numbers"]


def test_a_consumer_above_takes_only_if_it_names_the_source() -> None:
    assert edges(build(P(numbers), C(log), P(urls))) == {("numbers", "log"), ("urls", None)}
    assert edges(build(P(numbers), C(log, urls, numbers), P(urls))) == {("numbers", "log"), ("urls", "log")}


def test_each_member_of_a_union_goes_its_own_way() -> None:
    graph = build(P(urls_and_rows), C(fetch), C(write))
    node = graph.nodes["urls_and_rows"]

    assert edges(graph) == {("urls_and_rows", "fetch"), ("urls_and_rows", "write"), ("fetch", None)}
    assert [node.routes[route].takers for route in node.member_routes] == [("fetch",), ("write",)]


def test_members_with_the_same_takers_share_a_route() -> None:
    graph = build(P(urls_and_rows), C(log))

    assert graph.nodes["urls_and_rows"].routes == (Route(("log",)),)
    assert graph.nodes["urls_and_rows"].member_routes == (0, 0)
    assert graph.edges == (Edge("urls_and_rows", "log"),)


def test_a_member_that_nobody_takes_is_a_result() -> None:
    assert edges(build(P(urls_and_rows), C(write))) == {("urls_and_rows", "write"), ("urls_and_rows", None)}


def test_named_takers_of_one_member_leave_the_others_to_the_rule() -> None:
    graph = build(P(urls_and_rows), C(write, urls_and_rows), C(log))

    assert edges(graph) == {("urls_and_rows", "write"), ("urls_and_rows", "log")}


def test_a_consumer_of_a_union_takes_each_member() -> None:
    def both() -> Iterator[Page | Row]: ...

    graph = build(P(both), C(page_or_row))

    assert graph.edges == (Edge("both", "page_or_row"),)


def test_items_that_are_none_are_no_edge() -> None:
    def maybe(url: Url) -> Page | None: ...

    graph = build(P(urls), C(maybe), C(store))

    assert edges(graph) == {("urls", "maybe"), ("maybe", "store")}
    assert graph.nodes["maybe"].signature.nullable


def test_a_subclass_follows_its_declared_class() -> None:
    assert edges(build(P(links), C(fetch))) == {("links", "fetch"), ("fetch", None)}
    assert "nothing above" in problems(P(urls), C(lambda_of(Link), name="only_links"))[0]


def lambda_of(annotation: Any) -> Function:
    def take(item: Any) -> None: ...

    take.__annotations__["item"] = annotation
    return take


def test_batches_are_wired_by_what_their_list_holds() -> None:
    assert edges(build(P(urls), C(lambda_of(list[Url]), name="bulk", batch=10))) == {("urls", "bulk")}


def test_one_function_may_be_declared_under_several_names() -> None:
    graph = build(P(urls, "a"), P(urls, "b"), C(fetch, "a", name="f"), C(any_url, urls))

    assert edges(graph) == {("a", "f"), ("a", "any_url"), ("b", "any_url"), ("f", None)}


# ── loops ────────────────────────────────────────────────────────────────────


def test_a_stage_may_feed_itself_if_it_says_so() -> None:
    graph = build(P(urls), C(crawl, "urls", "crawl"), C(store))

    assert edges(graph) == {("urls", "crawl"), ("crawl", "crawl"), ("crawl", "store")}
    assert graph.loops == {("crawl", "crawl")}
    assert [name for name, node in graph.nodes.items() if node.on_cycle] == ["crawl"]


def test_a_stage_does_not_feed_itself_by_type_alone() -> None:
    assert edges(build(P(urls), C(crawl), C(store))) == {
        ("urls", "crawl"),
        ("crawl", "store"),
        ("crawl", None),
    }


def test_a_consumer_may_name_a_stage_below() -> None:
    def links_of(page: Page) -> Iterator[Link]: ...

    graph = build(P(urls), C(fetch, "urls", "links_of"), C(links_of), C(any_url, "fetch", "urls"))

    assert graph.loops == {("fetch", "links_of"), ("links_of", "fetch")}
    assert not graph.nodes["any_url"].on_cycle


# ── what is wrong ────────────────────────────────────────────────────────────


def test_a_consumer_that_nothing_reaches_is_told_with_who_gives_what() -> None:
    def raw(url: Url) -> bytes: ...

    (problem,) = problems(P(urls), C(raw), C(store))

    assert problem == (
        f"nothing above store() ({named(store, None)[1]}) gives a Page; "
        f"urls() ({named(urls, None)[1]}) gives Url; raw() ({named(raw, None)[1]}) gives bytes.\n"
        f"  Let raw() return Page, or name the stage that gives it: @pipeline.consumer(source=...)."
    )


@pytest.mark.parametrize("sources", [(), ("raw",)])
def test_a_stage_that_gives_what_it_takes_is_not_told_to_feed_itself(sources: tuple[str, ...]) -> None:
    def raw(url: Url) -> bytes: ...
    def again(page: Page) -> Page: ...

    (problem,) = problems(P(urls), C(raw), C(again, *sources))

    assert "Let raw() return Page" in problem
    assert "source='again'" not in problem
    assert "again() does" not in problem


@pytest.mark.parametrize(
    ("annotation", "given", "inside"),
    [
        (list[Page], "list[Page]", "Page"),
        (tuple[Special, ...], "tuple[Special, ...]", "Special"),
        (list, "list", "Page"),
    ],
)
@pytest.mark.parametrize("sources", [(), ("pages",)])
def test_a_container_that_is_one_item_is_told_if_what_is_in_it_is_meant(
    annotation: Any, given: str, inside: str, sources: tuple[str, ...]
) -> None:
    def pages(url: Url) -> None: ...
    def again(page: Page) -> Page: ...

    pages.__annotations__["return"] = annotation

    (problem,) = problems(P(urls), C(pages), C(again, *sources))

    advice = f"pages() gives one {given}: annotate it -> Iterator[{inside}] to give each item."
    assert problem.splitlines()[-1] == f"  {advice}"


def test_a_stage_that_gives_several_containers_is_told_to_give_what_is_in_them() -> None:
    def pages() -> Iterator[list[Page]]: ...

    (problem,) = problems(P(pages), C(store))

    assert problem.endswith("pages() gives one list[Page]: yield what is in it, -> Iterator[Page].")


def test_a_consumer_whose_items_another_takes_is_told_who() -> None:
    (problem,) = problems(P(urls), C(fetch), C(any_url))

    assert "nothing reaches any_url()" in problem
    assert "goes to fetch() (pipeline.py:" in problem
    assert "source='urls' on both" in problem


def test_a_consumer_above_its_source_is_told_to_name_it() -> None:
    (problem,) = problems(P(numbers), C(log, "numbers"), C(store), C(fetch, "more_urls"), P(more_urls))

    assert "nothing above store()" in problem
    assert "@pipeline.consumer(source='fetch')" in problem


def test_a_source_that_gives_nothing_that_fits_is_told() -> None:
    (problem,) = problems(P(urls), P(numbers), C(fetch, numbers))

    assert "no source of fetch()" in problem
    assert "numbers() (pipeline.py:" in problem
    assert "gives int" in problem
    assert "urls() does: name it." in problem


def test_a_loop_that_no_producer_leads_into_is_told() -> None:
    def turn(page: Page) -> Url: ...

    (problem,) = problems(P(numbers), C(log), C(fetch, "turn"), C(turn, "fetch"))[:1]

    assert "reached only from a loop" in problem


def test_what_lies_behind_an_unreached_stage_is_not_told_as_well() -> None:
    (problem,) = problems(P(numbers), C(fetch), C(store))

    assert "fetch()" in problem


def test_a_resource_in_the_items_place_is_pointed_at() -> None:
    def save(db: Box[int], page: Page) -> None: ...
    def db() -> Box[int]: ...

    found = problems(P(urls), C(fetch), C(save), R(db))

    assert any("Its first parameter, db, is its item" in problem for problem in found)


def test_an_unknown_source_is_told_with_a_close_name() -> None:
    (problem,) = problems(P(urls), C(fetch, "urlz"))

    assert "source='urlz' names no stage (did you mean 'urls'?)" in problem


def test_a_source_that_is_no_stage_is_told() -> None:
    (problem,) = problems(P(urls), C(fetch, numbers))

    assert "source=numbers is no stage" in problem


def test_two_stages_of_one_name_are_told() -> None:
    found = problems(P(urls), P(more_urls, "urls"), C(fetch))

    assert any("two stages are called 'urls'" in problem for problem in found)


def test_a_stage_may_be_called_like_a_resource() -> None:
    def store(page: Page, fetch: int) -> None: ...
    def resource() -> int: ...

    resource.__name__ = "fetch"

    assert build(P(urls), C(fetch), C(store), R(resource)).nodes["store"].resources == ("fetch",)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    def bare(item) -> None: ...  # type: ignore[no-untyped-def]
    def maybe(page: Page | None) -> None: ...
    def needy(row: Row, password: str) -> None: ...

    found = problems(
        P(urls, workers=2), C(fetch), C(bare), C(maybe, "nowhere"), C(needy), C(any_url, "fetch")
    )

    for text in (
        "urls() (pipeline.py:",
        "has no annotation",
        "accepts None",
        "names no stage",
        "its parameter password",
        "nothing above needy()",
        "no source of any_url()",
        "workers=2",
    ):
        assert any(text in problem for problem in found), text
    assert len(found) == len(set(found)) == 7


def test_the_message_of_the_error_holds_every_problem() -> None:
    with pytest.raises(PipelineError) as caught:
        build(P(urls), C(store), C(fetch, "urlz"))

    assert str(caught.value) == "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 2


def test_a_stage_behind_an_unreadable_return_is_not_blamed() -> None:
    namespace: dict[str, Any] = {"Url": Url}
    exec("def bad(url: Url) -> 'Missing': ...", namespace)

    (problem,) = problems(P(urls), C(namespace["bad"]), C(store))

    assert "'Missing'" in problem


def test_consumers_alone_can_be_fed_by_hand() -> None:
    graph = build(C(fetch), C(store))

    assert edges(graph) == {("fetch", "store")}
    assert "has no producer" in problems(C(fetch), need_producer=True)[0]


def test_a_consumer_alone_that_names_a_source_must_get_something() -> None:
    (problem,) = problems(C(fetch), C(log, "fetch"), C(write, "fetch"))

    assert "no source of write()" in problem


# ── contradictions ───────────────────────────────────────────────────────────


def sharded(part: Shard) -> Iterator[Url]: ...
def consumer_with_shard(url: Url, part: Shard) -> None: ...


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ([P(urls, workers=2), C(fetch)], "annotated Shard"),
        ([P(urls), C(consumer_with_shard)], "only a producer has a Shard"),
        ([P(urls), C(crawl, "urls", "crawl", ordered=True), C(store)], "ordered=True in a loop"),
        ([P(urls), C(fetch, min_backoff=5, max_backoff=1)], "min_backoff=5.0 is more than max_backoff=1.0"),
        ([P(urls), C(fetch, batch=5)], "batch=5, but its parameter url is annotated Url"),
        ([P(urls, params={"rot": "x"}), C(fetch)], "params= names 'rot'"),
        ([P(urls, params={"root": 5}), C(fetch)], "parameter root=5 of urls()"),
    ],
)
def test_options_that_contradict_are_told(declared: list[Stage], text: str) -> None:
    (problem,) = problems(*declared)

    assert text in problem
    assert "pipeline.py:" in problem


@pytest.mark.parametrize(
    "declared",
    [
        [P(sharded, workers=4), C(fetch)],
        [P(sharded), C(fetch)],
        [P(urls), C(fetch, ordered=True, workers=4)],
        [P(urls), C(fetch, max_backoff=0.01)],
        [P(urls, params={"root": "x"}), C(fetch)],
    ],
)
def test_options_that_agree_are_fine(declared: list[Stage]) -> None:
    assert build(*declared)


# ── parameters ───────────────────────────────────────────────────────────────


def db(path: str = "x.db", cache: int = 0) -> Iterator[int]: ...
def cache() -> int: ...
def keep(page: Page, db: int, job: Job, root: str, limit: int = 3) -> None: ...
def needs(size: int) -> Iterator[Url]: ...


def test_a_parameter_is_a_resource_then_a_parameter_of_the_run_then_its_default() -> None:
    graph = build(P(urls), C(fetch), C(keep), R(db), R(cache))

    assert graph.nodes["keep"].resources == ("db",)
    assert graph.nodes["keep"].parameters == ("root", "limit")
    assert graph.resources["db"].resources == ("cache",)
    assert graph.resources["db"].parameters == ("path",)
    assert graph.opening_order("keep") == ["cache", "db"]


def test_all_parameters_of_a_run_are_listed_with_who_takes_them() -> None:
    graph = build(P(urls), C(fetch), C(keep), R(db))

    found = graph_parameters(graph)

    assert set(found) == {"root", "limit", "path", "cache"}
    assert [(who.partition(" ")[0], kind) for who, kind, _ in found["root"]] == [
        ("urls()", str),
        ("keep()", str),
    ]


def test_values_are_read_by_each_functions_own_annotation() -> None:
    def sizes(root: int) -> Iterator[Url]: ...

    graph = build(P(urls), P(sizes), C(fetch), C(keep), R(db))

    bound = bind(graph, {"root": "5", "path": "y"}, texts=True)

    assert bound == {
        "urls": {"root": "5"},
        "sizes": {"root": 5},
        "fetch": {},
        "keep": {"root": "5"},
        "resource:db": {"path": "y"},
    }


def test_params_of_a_declaration_are_bound_and_no_parameter_of_the_run() -> None:
    def cook(dish: str, count: int = 1) -> Iterator[Url]: ...

    graph = build(P(cook, "sam", params={"dish": "noodles"}), P(cook, "kim", params={"count": "2"}), C(fetch))

    assert graph.nodes["sam"].parameters == ("count",)
    assert bind(graph, {"dish": "soup"}) == {
        "sam": {"dish": "noodles"},
        "kim": {"count": 2, "dish": "soup"},
        "fetch": {},
    }


def test_a_required_parameter_of_a_producer_is_asked_for_only_when_it_runs() -> None:
    graph = build(P(needs), C(fetch))

    assert bind(graph, {}, producers=False)["needs"] == {}
    with pytest.raises(PipelineError, match=r"needs\(\) .* needs the parameter size: run with size="):
        bind(graph, {})


@pytest.mark.parametrize(("given", "fine"), [(None, False), ({}, False), ({"token": 1}, True)])
def test_a_required_parameter_of_a_consumer_comes_from_somewhere(
    given: dict[str, Any] | None, fine: bool
) -> None:
    def guarded(url: Url, token: str) -> None: ...

    declared = [P(urls), C(guarded)]

    if fine:
        assert build(*declared, given=given).nodes["guarded"].parameters == ("token",)
    else:
        assert "token is neither a resource nor a parameter of the run" in problems(*declared, given=given)[0]


@pytest.mark.parametrize("given", [None, {}])
def test_a_parameter_that_is_nearly_a_resource_is_told_with_its_name(given: dict[str, Any] | None) -> None:
    def stored(url: Url, bd: int) -> None: ...

    (problem,) = problems(P(urls), C(stored), R(db), R(cache), given=given)

    assert "its parameter bd is neither" in problem
    assert "(did you mean 'db'?)" in problem


def test_a_parameter_that_every_run_is_to_give_is_fine_where_a_producer_takes_it_too() -> None:
    def guarded(url: Url, token: str) -> None: ...
    def urls_of(token: str) -> Iterator[Url]: ...

    (problem,) = problems(P(urls), C(guarded))
    graph = build(P(urls_of), C(guarded))

    assert "every run to give token=...? Let a producer take it, too" in problem
    assert graph.nodes["guarded"].parameters == ("token",)


def test_a_required_parameter_of_a_resource_is_told_too() -> None:
    def secret(key: str) -> str: ...

    assert "secret() (pipeline.py:" in problems(P(urls), C(fetch), R(secret))[0]


@pytest.mark.parametrize(
    ("given", "texts", "message"),
    [
        ({"rooot": "x"}, False, "nothing takes a parameter 'rooot' (did you mean 'root'?); there are"),
        ({"db": "x", "root": "x"}, False, "db is a resource"),
        ({"limit": "many", "root": "x"}, True, "parameter limit='many' of keep() (pipeline.py:"),
        ({"limit": [], "root": "x"}, False, "is no int: Input should be a valid integer; got list []"),
    ],
)
def test_a_wrong_parameter_is_told(given: dict[str, Any], texts: bool, message: str) -> None:
    graph = build(P(urls), C(fetch), C(keep), R(db))

    with pytest.raises(PipelineError) as caught:
        bind(graph, given, texts)

    assert message in str(caught.value)


def test_all_wrong_parameters_are_told_at_once() -> None:
    graph = build(P(needs), P(urls), C(fetch))

    with pytest.raises(PipelineError) as caught:
        bind(graph, {"rot": 1, "root": 5})

    assert len(caught.value.problems) == 3


def test_resources_that_need_each_other_are_told() -> None:
    def a(b: int) -> int: ...
    def b(a: int) -> int: ...

    (problem,) = problems(P(urls), C(fetch), R(a), R(b))

    assert "in a circle: a() (pipeline.py:" in problem


def test_a_resource_may_have_a_parameter_of_its_own_name() -> None:
    def path(path: str = "x") -> str: ...

    graph = build(P(urls), C(fetch), R(path))

    assert (graph.resources["path"].resources, graph.resources["path"].parameters) == ((), ("path",))


# ── found by name ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_functions_that_cannot_be_found_by_name_are_told(start_method: str) -> None:
    def local(page: Page) -> None: ...

    graph = build(P(urls), C(fetch, key=lambda _: "same"), C(local))

    found = find_by_name_problems(graph, start_method, start_method)

    assert [text.partition(" ")[0] for text in found] == ["fetch()", "local()"]
    assert "its key= can't be found by name" in found[0]
    assert all("start_method='fork'" in text for text in found)


def test_it_is_told_why_workers_are_not_forked() -> None:
    def local(page: Page) -> None: ...

    graph, done = build(P(urls), C(fetch), C(local)), threading.Event()
    alone = find_by_name_problems(graph, "auto", "forkserver")
    thread = threading.Thread(target=done.wait, name="tqdm_monitor")
    thread.start()
    beside = find_by_name_problems(graph, "auto", "forkserver")
    asked = find_by_name_problems(graph, "forkserver", "forkserver")
    done.set()
    thread.join()

    assert "while other threads run (here tqdm_monitor): move it" in beside[0]
    assert "tqdm" not in alone[0] + asked[0]


@pytest.mark.parametrize("start_method", ["fork", "thread", "inline", "auto"])
def test_any_function_is_fine_where_it_need_not_be_found(start_method: str) -> None:
    def local(page: Page) -> None: ...

    assert find_by_name_problems(build(P(urls), C(fetch), C(local)), start_method, start_method) == []


def test_a_name_that_stands_for_another_function_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = build(P(urls), C(fetch))
    monkeypatch.setitem(globals(), "fetch", functools.partial(fetch))

    assert "not the same object" in find_by_name_problems(graph, "spawn", "spawn")[0]
