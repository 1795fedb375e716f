"""A pipeline's graph as a picture: text, and what mermaid, Graphviz and browsers draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from html import escape

from jobq.annotations import spell
from jobq.graph import Graph
from jobq.stage import describe

RESULTS = "results"


def _labelled(graph: Graph) -> Iterator[tuple[str, str, str | None]]:
    """Return every edge with the types that go along it."""
    for edge in graph.edges:
        node = graph.nodes[edge.source]
        kinds = [
            spell(kind)
            for kind, route in zip(node.signature.outputs, node.member_routes, strict=True)
            if edge.target in (node.routes[route].takers or (None,))
        ]
        yield edge.source, " | ".join(kinds), edge.target


def as_text(graph: Graph) -> str:
    """Return the graph as lines: each stage, and where each type that it gives goes."""
    lines = [graph.name] if graph.name else []
    edges = list(_labelled(graph))
    for name, node in graph.nodes.items():
        lines.append(f"{describe(node.stage)} {node.stage.kind}")
        lines += [f"  {kinds} -> {target or RESULTS}" for source, kinds, target in edges if source == name]
    for inner in graph.resources.values():
        users = [
            name for name, node in graph.nodes.items() if inner.resource.name in graph.opening_order(name)
        ]
        lines.append(f"{describe(inner.resource)} resource of {', '.join(users) or 'nobody'}")
    return "\n".join(lines)


def as_mermaid(graph: Graph) -> str:
    """Return the graph as a mermaid flowchart."""
    number = {name: f"s{index}" for index, name in enumerate(graph.nodes)}
    lines = ["flowchart TD"]
    for name, node in graph.nodes.items():
        left, right = ("([", "])") if node.stage.kind == "producer" else ("[", "]")
        lines.append(f'    {number[name]}{left}"{name}"{right}')
    if any(edge.target is None for edge in graph.edges):
        lines.append(f'    {RESULTS}[("{RESULTS}")]')
    for source, kinds, target in _labelled(graph):
        end = RESULTS if target is None else number[target]
        lines.append(f'    {number[source]} -->|"{kinds.replace(chr(34), "#quot;")}"| {end}')
    return "\n".join(lines)


def as_dot(graph: Graph) -> str:
    """Return the graph in Graphviz's language."""
    lines = [f"digraph {json.dumps(graph.name or 'pipeline')} {{", "    node [shape=box]"]
    for name, node in graph.nodes.items():
        shape = " [shape=ellipse]" if node.stage.kind == "producer" else ""
        lines.append(f"    {json.dumps(name)}{shape}")
    if any(edge.target is None for edge in graph.edges):
        lines.append(f'    results_ [label="{RESULTS}", shape=cylinder]')
    for source, kinds, target in _labelled(graph):
        end = "results_" if target is None else json.dumps(target)
        lines.append(f"    {json.dumps(source)} -> {end} [label={json.dumps(kinds)}]")
    return "\n".join([*lines, "}"])


# Sizes in the SVG, in pixels; text is about 7.5 wide and 13 high.
BOX_HEIGHT, ROW_HEIGHT, GAP, MARGIN, LETTER = 36, 110, 60, 30, 7.5

#: An arrow's head.
HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8"'
    ' orient="auto"><path d="M0 0 8 4 0 8z"/></marker></defs>'
)


def as_svg(graph: Graph) -> str:
    """Return the graph as an SVG: a row for each distance from the producers, results below."""
    rows = _rows(graph)
    widths = {name: max(60.0, LETTER * len(name) + 24) for row in rows for name in row}
    longest = max((LETTER * len(kinds) for _, kinds, _ in _labelled(graph)), default=0.0)
    gap = max(GAP, longest)
    spans = [sum(widths[name] for name in row) + gap * (len(row) - 1) for row in rows]
    width = max(spans, default=0.0) + 2 * MARGIN + 2 * longest + GAP  # what flows back passes at the right
    height = ROW_HEIGHT * len(rows) - (ROW_HEIGHT - BOX_HEIGHT) + 2 * MARGIN
    middle: dict[str, tuple[float, float]] = {}
    for depth, (row, span) in enumerate(zip(rows, spans, strict=True)):
        left = (width - longest - span) / 2
        for name in row:
            middle[name] = left + widths[name] / 2, MARGIN + depth * ROW_HEIGHT + BOX_HEIGHT / 2
            left += widths[name] + gap
    arrows = [
        _arrow(middle[source], middle[target or ""], kinds, widths[source])
        for source, kinds, target in _labelled(graph)
    ]
    boxes = [_box(graph, name, widths[name], *middle[name]) for row in rows for name in row]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
    return "\n".join(
        [
            f'{head} font-family="sans-serif" font-size="13" text-anchor="middle">',
            f"<title>{escape(graph.name or 'pipeline')}</title>",
            HEAD,
            '<rect width="100%" height="100%" fill="white"/>',
            *arrows,
            *boxes,
            "</svg>",
        ]
    )


def _rows(graph: Graph) -> list[list[str]]:
    """Return the stages by their distance from the producers; "" stands for the results, in the last row."""
    depth = dict.fromkeys((node.stage.name for node in graph.producers()), 0)
    for name in graph.nodes:
        depth.setdefault(
            name, 0 if not any(edge.target == name for edge in graph.edges) else len(graph.nodes)
        )
    for _ in graph.nodes:
        for edge in graph.edges:
            if edge.target is not None:
                depth[edge.target] = min(depth[edge.target], depth[edge.source] + 1)
    rows: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name in graph.nodes:
        rows[depth[name]].append(name)
    if any(edge.target is None for edge in graph.edges):
        rows.append([""])
    return [row for row in rows if row]


def _box(graph: Graph, name: str, width: float, x: float, y: float) -> str:
    is_stage = name in graph.nodes and graph.nodes[name].stage.kind == "consumer"
    corner, fill = (4, "#eef4ff") if is_stage else (BOX_HEIGHT / 2, "#f4f4f4")
    left, top = x - width / 2, y - BOX_HEIGHT / 2
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{BOX_HEIGHT}" '
        f'rx="{corner}" fill="{fill}" stroke="black"/>'
        f'<text x="{x:.1f}" y="{y + 4.5:.1f}">{escape(name or RESULTS)}</text>'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float], kinds: str, width: float) -> str:
    (x, y), (to_x, to_y) = start, end
    if to_y > y:
        y, to_y = y + BOX_HEIGHT / 2, to_y - BOX_HEIGHT / 2
        corners = (x, y, x, y + 40, to_x, to_y - 40, to_x, to_y)
        label_x = (x + to_x) / 2
    else:  # back up, or to itself: around the right side
        side = max(x, to_x) + width / 2 + GAP / 2
        y, to_y = y + 8, to_y - 8
        corners = (x + width / 2, y, side, y, side, to_y, to_x + width / 2, to_y)
        label_x = side + LETTER * len(kinds) / 2
    path = "M{:.1f} {:.1f} C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}".format(*corners)
    halo = 'stroke="white" stroke-width="4" paint-order="stroke"'
    return (
        f'<path d="{path}" fill="none" stroke="black" marker-end="url(#head)"/>'
        f'<text x="{label_x:.1f}" y="{(y + to_y) / 2 + 4:.1f}" {halo}>{escape(kinds)}</text>'
    )


#: The formats of ``jobq graph``.
FORMS: Mapping[str, Callable[[Graph], str]] = {
    "text": as_text,
    "mermaid": as_mermaid,
    "dot": as_dot,
    "svg": as_svg,
}
