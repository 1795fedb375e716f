"""The files that a run writes, looked at before it starts: it must not find out at its end that it can't."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from jobq.errors import PipelineError
from jobq.options import DEFAULT_NAME, RunOptions, dead_letter_path
from jobq.stage import Resource, Stage

STANDARD_STREAM = Path("-")


def check_files(options: RunOptions, declared: Iterable[Stage | Resource], pipeline: str) -> None:
    """Raise `PipelineError` if a file can't be written, or is one that the run reads."""
    written: dict[str, Path] = {}
    if options.output is not None and options.output != STANDARD_STREAM:
        written["results"] = options.output
    if options.dead_letters is not None and options.dead_letters != Path(DEFAULT_NAME):  # there may be none
        written["dead letters"] = dead_letter_path(options.dead_letters, pipeline=pipeline, run="")
    if not written:
        return
    read = {f"where {one.name}() is defined": Path(_source(one)) for one in declared}
    if options.input is not None and options.input != STANDARD_STREAM:
        read["the run's input"] = options.input
    problems = [*_unwritable(written), *_overwritten(written, read)]
    if problems:
        raise PipelineError(*problems)


def _unwritable(written: dict[str, Path]) -> Iterator[str]:
    for what, path in written.items():
        folder = path.parent
        if not folder.is_dir():
            yield f"can't write {what} to {path}: there is no folder {folder}."
        elif path.is_dir():
            yield f"can't write {what} to {path}: it is a folder."
        elif not os.access(path if path.exists() else folder, os.W_OK):
            yield f"can't write {what} to {path}: permission denied."


def _overwritten(written: dict[str, Path], read: dict[str, Path]) -> Iterator[str]:
    for what, path in written.items():
        others = (other for other, its in read.items() if _same(path, its))
        for other in others:
            yield f"{what} would overwrite {path}, which is {other}: name another file."
    if len(written) == 2 and len({path.absolute() for path in written.values()}) == 1:
        yield f"results and dead letters can't both go to {written['results']}: name two files."


def _same(one: Path, other: Path) -> bool:
    try:
        return one.is_file() and one.samefile(other)
    except OSError:
        return False


def _source(declared: Stage | Resource) -> str:
    code = getattr(declared.function, "__code__", None)
    return code.co_filename if code is not None else os.devnull
