"""``--input``: JSON lines take the place of a pipeline's producers."""

from __future__ import annotations

import os
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

    It has a route to each of ``takers``; by which one an item goes, `jobq.work.Addressed` says (else the
    first), and not its type. For what is no item it yields `Unfit`.
    """

    stage: Stage
    values: Mapping[str, Any]
    takers: tuple[str, ...]


def input_source(path: Path, graph: Graph) -> Source:
    """
    Return what reads *path* ("-": standard input) for the first consumer of *graph*.

    Raises `PipelineError` if there is no such file, or items of that type can't be read from JSON.
    """
    consumer = next((node.stage for node in graph.consumers()), None)
    if consumer is None:
        raise PipelineError(f"pipeline {graph.name!r} has no consumer that could take the items of --input.")
    if path == Path("-"):
        # By this path a worker opens the driver's standard input, however it was started.
        source, shown = f"/proc/{os.getpid()}/fd/0", "standard input"
    else:
        source, shown = str(path.absolute()), str(path)
        if not path.is_file():
            raise PipelineError(f"there is no file {path} to read items from.")
    try:
        json_reader(read_signature(consumer).item_type)
    except Exception as error:  # pydantic has several errors for types that it does not know
        taken = spell(read_signature(consumer).item_type)
        raise PipelineError(
            f"{describe(consumer)} takes {taken}, which can't be read from JSON lines."
        ) from error
    stage = Stage(NAME, "producer", read_lines, ProducerOptions(), (), shown)
    return Source(stage, {"source": source, "shown": shown, "consumer": consumer}, (consumer.name,))
