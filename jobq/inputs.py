"""``--input``: JSON lines take the place of a pipeline's producers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobq.annotations import read_signature, spell
from jobq.errors import PayloadError, PipelineError
from jobq.stage import ProducerOptions, Stage, describe
from jobq.work import Unfit

#: The name of the stage that stands for the producers.
NAME = "input"


def read_lines(source: str, shown: str, consumer: Stage) -> Iterator[Any]:
    """
    Yield the items of a file of JSON lines, validated as what *consumer* takes.

    A line that is not right is yielded as `Unfit`, with its number; empty lines are passed over.
    """
    adapter = _adapter(consumer)
    with Path(source).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                item = adapter.validate_json(line)
            except Exception as error:  # user code runs in validators
                text = line.decode("utf-8", "backslashreplace").rstrip("\n")
                yield Unfit(text, PayloadError(f"{shown}, line {number}: {_why(error)}"))
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
    _adapter(consumer)
    stage = Stage(NAME, "producer", read_lines, ProducerOptions(), (), shown)
    return stage, {"source": source, "shown": shown, "consumer": consumer}


def _adapter(consumer: Stage) -> Any:  # Any: TypeAdapter of a type known only at run time
    from pydantic import TypeAdapter

    item_type = read_signature(consumer).item_type
    try:
        return TypeAdapter(item_type)
    except Exception as error:  # pydantic has several errors for types that it does not know
        raise PipelineError(
            f"{describe(consumer)} takes {spell(item_type)}, which can't be read from JSON lines."
        ) from error


def _why(error: Exception) -> str:
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    return "; ".join(
        f"field {'.'.join(map(str, one['loc']))!r}: {one['msg']}" if one["loc"] else one["msg"]
        for one in errors()
    )
