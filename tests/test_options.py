"""What docs/options.md says of every option is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from jobq.options import RunOptions
from jobq.stage import ConsumerOptions, ProducerOptions, ResourceOptions

PAGE = (Path(__file__).parent.parent / "docs" / "options.md").read_text()
#: Defaults that are written as people say them.
SAID = {"(Exception,)": "Exception", str(64 * 1024 * 1024): "64 MiB"}
#: What every declaration takes besides its options.
ALWAYS = {"producer": {"name"}, "consumer": {"name", "source"}, "resource": {"name"}, "run": set[str]()}


def written(heading: str) -> dict[str, str]:
    """Return the default of each option in the table below a heading."""
    part = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|", part, re.MULTILINE)
    return {name: default.strip("`").strip('"') for name, default in rows}


def defaults(model: type[BaseModel]) -> dict[str, str]:
    """Return the default of each option of a model as the page would write it."""
    found = {}
    for name, option in model.model_fields.items():
        value = repr(option.get_default(call_default_factory=True))
        value = value.replace("<class 'Exception'>", "Exception")
        found[option.alias or name] = SAID.get(value, value).strip("'")
    return found


@pytest.mark.parametrize(
    ("heading", "kind", "model"),
    [
        ("`@pipeline.producer`", "producer", ProducerOptions),
        ("`@pipeline.consumer`", "consumer", ConsumerOptions),
        ("`@pipeline.resource`", "resource", ResourceOptions),
        ("A run", "run", RunOptions),
    ],
)
def test_the_page_lists_every_option_with_its_default(
    heading: str, kind: str, model: type[BaseModel]
) -> None:
    rows = written(heading)

    assert {name: default for name, default in rows.items() if name not in ALWAYS[kind]} == defaults(model)
    assert ALWAYS[kind] <= rows.keys()
