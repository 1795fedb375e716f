"""``jobq check`` and ``jobq graph``: what a pipeline is, without running it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from jobq.cli.ending import USAGE, explained, print_out

if TYPE_CHECKING:
    from jobq.graph import Graph


@click.command()
@click.argument("target")
@click.option("--json", "as_json", is_flag=True, help="Write what was found as JSON.")
def check(target: str, as_json: bool) -> None:
    """Check the pipeline TARGET and list every problem."""
    from jobq.errors import PipelineError

    with explained():
        try:
            found = _found(target)
        except PipelineError as error:
            if not as_json:
                raise
            found = {"ok": False, "problems": list(error.problems), "stages": [], "edges": []}
        print_out(json.dumps(found, indent=2) if as_json else _in_words(found))
    sys.exit(0 if found["ok"] else USAGE)


@click.command()
@click.argument("target")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "mermaid", "dot", "svg"]),
    default="text",
    show_default=True,
)
def graph(target: str, form: str) -> None:
    """Draw how the stages of the pipeline TARGET are connected."""
    from jobq.load import load_target

    with explained():
        from jobq.pictures import FORMS

        loaded = load_target(target)
        print_out(FORMS[form](loaded.pipeline.graph()))


def _found(target: str) -> dict[str, Any]:
    from jobq.load import load_target

    pipeline = load_target(target).pipeline
    pipeline.check()
    return {"ok": True, "problems": [], **_parts(pipeline.graph())}


def _parts(graph: Graph) -> dict[str, list[Any]]:
    stages = (node.stage for node in graph.nodes.values())
    return {
        "stages": [
            {"name": s.name, "kind": s.kind, "location": s.location, "workers": s.options.workers}
            for s in stages
        ],
        "edges": [{"source": edge.source, "target": edge.target} for edge in graph.edges],
    }


def _in_words(found: dict[str, Any]) -> str:
    stages, edges = len(found["stages"]), len(found["edges"])
    return f"ok: {stages} stage{'' if stages == 1 else 's'}, {edges} edge{'' if edges == 1 else 's'}"
