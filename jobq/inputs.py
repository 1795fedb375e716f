"""``--input``: JSON lines take the place of a pipeline's producers."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobq.annotations import read_signature, spell
from jobq.errors import PayloadError, PipelineError
from jobq.graph import Graph
from jobq.stage import ProducerOptions, Stage, describe
from jobq.validation import json_reader
from jobq.work import Unfit

#: How a process names what it has open.
DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
#: The name of the stage that stands for the producers.
NAME = "input"


def read_lines(source: str, shown: str, consumer: Stage) -> Iterator[Any]:
    """
    Yield the items of a file of JSON lines, validated as what *consumer* takes.

    A line that is not right is yielded as `Unfit`, with its number; empty lines are passed over.
    """
    read = json_reader(read_signature(consumer).item_type)
    with Path(source).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)  # noqa: PLW2901  # as some editors begin a file
            if not line.strip():
                continue
            try:
                item = read(line)
            except ValueError as error:
                text = line.decode("utf-8", "backslashreplace").rstrip("\n")
                yield Unfit(text, PayloadError(f"{shown}, line {number}: {error}"))
            else:
                yield item


@dataclass(frozen=True, slots=True)
class Source:
    """
    What takes the place of a pipeline's producers: a stage of jobq's own, with its parameters.

    Each of its ``routes`` is the names of those who take an item together; by which one an item goes,
    `jobq.work.Addressed` says (else the first), and not its type. For what is no item it yields `Unfit`.
    """

    stage: Stage
    values: Mapping[str, Any]
    routes: tuple[tuple[str, ...], ...]


def input_source(path: Path, graph: Graph) -> Source:
    """
    Return what reads *path* ("-": standard input) for the first consumer of *graph*.

    Who would take a producer's items together with it, takes these, too.

    Raises `PipelineError` if there is no such file, or items of that type can't be read from JSON.
    """
    consumer = next((node.stage for node in graph.consumers()), None)
    if consumer is None:
        raise PipelineError(f"pipeline {graph.name!r} has no consumer that could take the items of --input.")
    if path == Path("-"):
        # By this path a worker opens the driver's standard input, however it was started.
        source, shown = f"/proc/{os.getpid()}/fd/0", "standard input"
    else:
        source, shown = _as_others_see_it(path), str(path)
        if not path.exists() or path.is_dir():
            raise PipelineError(f"there is no file {path} to read items from.")
    try:
        json_reader(read_signature(consumer).item_type)
    except Exception as error:  # pydantic has several errors for types that it does not know
        taken = spell(read_signature(consumer).item_type)
        raise PipelineError(
            f"{describe(consumer)} takes {taken}, which can't be read from JSON lines."
        ) from error
    stage = Stage(NAME, "producer", read_lines, ProducerOptions(), (), shown)
    together = [
        route.takers for node in graph.producers() for route in node.routes if consumer.name in route.takers
    ]
    route = together[0] if together else (consumer.name,)
    return Source(stage, {"source": source, "shown": shown, "consumer": consumer}, (route,))


def _as_others_see_it(path: Path) -> str:
    """Return a path of a file for a worker; a shell's ``<(...)`` is a descriptor of this process."""
    found = DESCRIPTOR.fullmatch(str(path.absolute()))
    return f"/proc/{os.getpid()}/fd/{found[1]}" if found else str(path.absolute())
