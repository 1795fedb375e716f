"""A pipeline's graph as text, mermaid, dot and SVG."""
# Functions here are there for their annotations.
# mypy: disable-error-code="empty-body"

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

from jobq import Pipeline
from jobq.graph import Graph
from jobq.pictures import FORMS, as_dot, as_mermaid, as_svg, as_text


class Url: ...


class Link(Url): ...


class Page: ...


class Row: ...


def urls(root: str = "/") -> Iterator[Url]: ...
def urls_and_rows() -> Iterator[Url | Row]: ...
def crawl(url: Url) -> Iterator[Page | Link]: ...
def index(page: Page, db: int) -> Row: ...
def log(anything: Any) -> None: ...
def db(path: str = "x.db") -> int: ...


def picture() -> Graph:
    pipeline = Pipeline("crawl")
    pipeline.producer(urls)
    pipeline.consumer(crawl, source=["urls", "crawl"])
    pipeline.consumer(index, source="crawl")
    pipeline.resource(db)
    return pipeline.graph()


def two_kinds() -> Graph:
    pipeline = Pipeline('a "quoted" <name>')
    pipeline.producer(urls_and_rows)
    pipeline.consumer(log)
    return pipeline.graph()


def test_the_text_shows_stages_types_and_results() -> None:
    lines = [line.split(" (")[0] if "(" in line else line for line in as_text(picture()).splitlines()]

    assert lines == [
        "crawl",
        "urls()",
        "  Url -> crawl",
        "crawl()",
        "  Page -> index",
        "  Link -> crawl",
        "index()",
        "  Row -> results",
        "db()",
    ]


def test_the_mermaid_chart_has_a_line_for_each_edge() -> None:
    chart = as_mermaid(picture())

    assert chart.startswith("flowchart TD\n")
    assert 's0(["urls"])' in chart
    assert 's1 -->|"Link"| s1' in chart
    assert 's2 -->|"Row"| results' in chart


def test_the_mermaid_chart_shows_several_types_on_one_edge() -> None:
    assert '-->|"Url | Row"|' in as_mermaid(two_kinds())


def test_the_dot_file_has_a_line_for_each_stage_and_edge() -> None:
    assert as_dot(picture()).splitlines() == [
        'digraph "crawl" {',
        "    node [shape=box]",
        '    "urls" [shape=ellipse]',
        '    "crawl"',
        '    "index"',
        '    results_ [label="results", shape=cylinder]',
        '    "urls" -> "crawl" [label="Url"]',
        '    "crawl" -> "index" [label="Page"]',
        '    "crawl" -> "crawl" [label="Link"]',
        '    "index" -> results_ [label="Row"]',
        "}",
    ]
    assert as_dot(two_kinds()).startswith('digraph "a \\"quoted\\" <name>" {')


def shown(svg: str) -> dict[str, tuple[float, float]]:
    """Return where each text is."""
    texts = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return {text.text or "": (float(text.attrib["x"]), float(text.attrib["y"])) for text in texts}


def test_the_svg_shows_every_stage_below_what_it_comes_from() -> None:
    svg = as_svg(picture())
    places = shown(svg)

    assert places.keys() == {"urls", "crawl", "index", "results", "Url", "Page", "Link", "Row"}
    heights = [places[name][1] for name in ("urls", "Url", "crawl", "Page", "index", "Row", "results")]
    assert heights == sorted(heights)
    assert places["Link"][0] > places["crawl"][0]


def test_nothing_in_the_svg_is_outside_of_it() -> None:
    for graph in (picture(), two_kinds()):
        svg = as_svg(graph)
        root = ET.fromstring(svg)
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        numbers = [
            float(x)
            for path in re.findall(r'<path d="(M[^"]*)" fill', svg)
            for x in re.findall(r"[\d.]+", path)
        ]
        assert all(0 <= x <= width for x in numbers[::2])
        assert all(0 <= y <= height for y in numbers[1::2])
        assert all(0 <= x <= width and 0 <= y <= height for x, y in shown(svg).values())


def test_a_name_that_is_markup_is_text_in_the_svg() -> None:
    assert "<title>a &quot;quoted&quot; &lt;name&gt;</title>" in as_svg(two_kinds())


def test_stages_beside_each_other_do_not_overlap() -> None:
    pipeline = Pipeline("fan")
    pipeline.producer(urls)
    for number in range(5):
        pipeline.consumer(log, name=f"log{number}", source="urls")
    places = shown(as_svg(pipeline.graph()))

    xs = sorted(places[f"log{number}"][0] for number in range(5))
    assert all(right - left > 60 for left, right in itertools.pairwise(xs))


def test_every_form_draws_a_graph_of_nothing_but_a_producer() -> None:
    pipeline = Pipeline("alone")
    pipeline.producer(urls)

    assert all(draw(pipeline.graph()) for draw in FORMS.values())
