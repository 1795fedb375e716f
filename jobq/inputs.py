"""``--input``: JSON lines take the place of a pipeline's producers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobq.annotations import read_signature, spell
from jobq.errors import PayloadError, PipelineError
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


def input_stage(path: Path, consumer: Stage) -> tuple[Stage, dict[str, Any]]:
    """
    Return the stage that reads *path* ("-": standard input) for *consumer*, and its parameters.

    Raises `PipelineError` if there is no such file, or items of that type can't be read from JSON.
    """
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
    return stage, {"source": source, "shown": shown, "consumer": consumer}
