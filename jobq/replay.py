"""
A dead-letter file, read: its letters as data, and their items on the way into the pipeline again.

    read_file ─> Letter | NoLetter ─> survey ─> Contents ─> replay_source ─> Source: read_letters, in a worker

Nothing that a file says is imported, and no pickle in it loaded, unless the caller says so.
"""

from __future__ import annotations

import ast
import base64
import json
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobq import inputs
from jobq.annotations import read_signature
from jobq.errors import Interrupted, PayloadError, PipelineError
from jobq.failure import JsonForm, safe_text, visible
from jobq.graph import Graph
from jobq.inputs import Source
from jobq.report import DeadLetter, counted
from jobq.stage import ProducerOptions, Stage
from jobq.work import Addressed, Unfit

#: The name of the stage that stands for the producers.
NAME = "dead letters"
#: So many lines are named where several have the same trouble.
LINES_NAMED = 5


class Letter(DeadLetter):
    """A letter as it stands in a file: its item is plain JSON data, or pickled (base64)."""

    item_pickle: str | None = None

    @property
    def has_item(self) -> bool:
        """Whether its item is there: a producer that raised had none, and some can't be written down."""
        return self.item is not None or self.item_pickle is not None


@dataclass(frozen=True, slots=True)
class NoLetter:
    """A line that is no dead letter, and why."""

    problem: str


def read_file(path: Path) -> Iterator[tuple[int, Letter | NoLetter]]:
    """Yield each line that is not empty, by its number from 1."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, read_line(line)


def read_line(line: bytes) -> Letter | NoLetter:
    """Return the letter that *line* is, or why it is none."""
    try:
        return Letter.model_validate(json.loads(line))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = f"field {'.'.join(map(str, problem['loc']))!r}: " if problem["loc"] else ""
        return NoLetter(f"{where}{problem['msg']}")
    except RecursionError:
        return NoLetter("it is nested too deeply")
    except ValueError as error:  # no JSON, no UTF-8, a number of more than 4300 digits
        return NoLetter(f"it is no JSON: {error}")


# ── what is in a file ────────────────────────────────────────────────────────


@dataclass(slots=True)
class Contents:
    """What a dead-letter file holds, in numbers; ``pickled`` and ``without_item`` have lines by stage."""

    path: Path
    letters: int = 0
    targets: set[str | None] = field(default_factory=set)
    pipelines: set[str] = field(default_factory=set)
    stages: Counter[str] = field(default_factory=Counter)
    pickled: dict[str, list[int]] = field(default_factory=dict)
    without_item: dict[str, list[int]] = field(default_factory=dict)
    no_letters: list[int] = field(default_factory=list)

    def lines_of(self, kind: Mapping[str, list[int]], stages: AbstractSet[str]) -> list[int]:
        """Return those lines of a *kind* that are of *stages*."""
        return sorted(line for stage in stages for line in kind.get(stage, ()))


def survey(path: Path) -> Contents:
    """Return what is in the file; raises `PipelineError` if there are lines, and no letter."""
    contents = Contents(path)
    problem = ""
    for number, letter in read_file(path):
        if isinstance(letter, NoLetter):
            problem = problem or f"line {number}: {visible(letter.problem)}"
            contents.no_letters.append(number)
            continue
        contents.letters += 1
        contents.targets.add(letter.target)
        contents.pipelines.add(letter.pipeline)
        contents.stages[letter.stage] += 1
        if not letter.has_item:
            contents.without_item.setdefault(letter.stage, []).append(number)
        elif letter.item is None:
            contents.pickled.setdefault(letter.stage, []).append(number)
    if problem and not contents.letters:
        raise PipelineError(f"{path} is no file of dead letters; {problem}.")
    return contents


def own_target(contents: Contents) -> str:
    """
    Return the target that the letters name, if it is a file of ours that makes their pipeline.

    A file of letters may come from anyone, so it must not choose what code runs: without ``--target`` that
    is a file below the current folder in whose text the pipeline is made. Imports nothing.
    Raises `PipelineError`.
    """
    named = contents.targets - {None}
    if len(contents.targets) != 1 or not named:
        told = ", ".join(sorted(visible(str(target)) for target in named)) or "none"
        raise PipelineError(
            f"the letters in {contents.path} name no single target ({told}).\n"
            "  Say which pipeline they are for: --target pipeline.py"
        )
    (target,) = named
    assert target is not None
    problem = _why_not_ours(target, contents.pipelines)
    if problem is not None:
        raise PipelineError(
            f"the letters in {contents.path} name the target {visible(target)!r}, {problem}.\n"
            "  A file of dead letters may come from anyone, so it does not choose what code is run.\n"
            "  If that is your pipeline, say so with --target."
        )
    return target


def _why_not_ours(target: str, pipelines: AbstractSet[str]) -> str | None:
    here = Path.cwd().resolve()
    try:
        # As `load_target` reads it.
        where = target if Path(target).is_file() else target.rpartition(":")[0] or target
        is_module = where.replace(".", "").isidentifier() and not Path(where).is_file()
        file = Path(*where.split(".")).with_suffix(".py") if is_module else Path(where)
        file = file.resolve(strict=True)
        if not (file.is_file() and file.is_relative_to(here)):
            return "which is not below the current folder"
        made = _pipelines_made(ast.parse(file.read_bytes()))
    except (OSError, RuntimeError):
        return "which is no file below the current folder"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "which is no Python that can be read"
    missing = sorted(pipelines - made)
    return f"which makes no Pipeline({visible(missing[0])!r})" if missing else None


def _pipelines_made(tree: ast.AST) -> set[str]:
    """Return the names with which the code calls ``Pipeline``, or a class whose name ends so."""
    return {
        call.args[0].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func).endswith("Pipeline")
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


# ── their way into the pipeline ──────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Replay:
    """What a run of a file's letters starts from, and what is left out, in words."""

    source: Source
    entering: int
    left_out: tuple[str, ...]


def plan_replay(contents: Contents, graph: Graph, *, unsafe_pickle: bool) -> Replay:
    """
    Return how the letters enter *graph*, each at its stage.

    Raises `PipelineError` if a stage is not there, or items are pickled and may not be loaded.
    """
    consumers = {node.stage.name: node.stage for node in graph.consumers()}
    givers = {node.stage.name for node in graph.producers()} | {inputs.NAME, NAME}
    stages = contents.stages.keys()
    entered = {name: stage for name, stage in consumers.items() if name in stages}
    unknown = sorted(stages - consumers.keys() - givers)
    problems = []
    if unknown:
        problems.append(
            f"pipeline {graph.name!r} has no stage {', '.join(repr(visible(name)) for name in unknown)},"
            f" of which there are letters in {contents.path}; it has {', '.join(consumers) or 'none'}.\n"
            "  Is it the right one? Name another with --target."
        )
    pickled = contents.lines_of(contents.pickled, entered.keys())
    if pickled and not unsafe_pickle:
        problems.append(
            f"{counted(len(pickled), 'letter')} in {contents.path} ({_named(pickled)}) of {contents.letters}"
            " have items that are pickled, and loading a pickle may run any code.\n"
            "  If you trust whoever wrote that file: --unsafe-pickle"
        )
    if problems:
        raise PipelineError(*problems)
    of_givers = sum(contents.stages[name] for name in givers if name not in consumers)
    itemless = contents.lines_of(contents.without_item, entered.keys())
    left_out = []
    if of_givers:
        left_out.append(
            f"{counted(of_givers, 'letter')} of producers: what else they had to give is not known"
        )
    if itemless:
        left_out.append(f"{counted(len(itemless), 'letter')} without an item ({_named(itemless)})")
    if contents.no_letters:
        left_out.append(f"what is no dead letter: {_named(contents.no_letters)}")
    entering = sum(contents.stages[name] for name in entered) - len(itemless)
    shown = str(contents.path)
    stage = Stage(NAME, "producer", read_letters, ProducerOptions(), (), shown)
    values = {
        "file": str(contents.path.absolute()),
        "shown": shown,
        "consumers": entered,
        "unsafe_pickle": unsafe_pickle,
    }
    return Replay(Source(stage, values, tuple((name,) for name in entered)), entering, tuple(left_out))


def read_letters(file: str, shown: str, consumers: Mapping[str, Stage], unsafe_pickle: bool) -> Iterator[Any]:
    """Yield the items of a file's letters, each addressed to the consumer where it died."""
    ways = {name: (route, _Reader(stage)) for route, (name, stage) in enumerate(consumers.items())}
    for number, letter in read_file(Path(file)):
        if isinstance(letter, NoLetter) or letter.stage not in ways or not letter.has_item:
            continue
        route, read = ways[letter.stage]
        try:
            item = _unpickled(letter, unsafe_pickle) if letter.item is None else read(letter.item)
        except Interrupted:
            raise
        except BaseException as error:  # user code runs in it, and if it was allowed a stranger's
            why = f"{shown}, line {number}: {type(error).__name__}: {safe_text(error)}"
            yield Unfit(letter.item_pickle or letter.item, PayloadError(why))
        else:
            yield Addressed(item, route)


class _Reader:
    """Makes plain data the item that a stage takes."""

    def __init__(self, stage: Stage) -> None:
        self._validates = stage.consumer.validate_items
        self._form = JsonForm(read_signature(stage).item_type)

    def __call__(self, data: Any) -> Any:
        """Return the item; what isn't one is returned as it is if the stage will refuse it by itself."""
        try:
            return self._form.item(json.dumps(data))
        except Exception:  # pydantic has several errors for types that it does not know
            if not self._validates:
                raise
            return data


def _unpickled(letter: Letter, allowed: bool) -> Any:
    if not allowed:
        raise PayloadError("its item is pickled, and was not when the file was looked through")
    return pickle.loads(base64.b64decode(letter.item_pickle or "", validate=True))


def _named(lines: list[int]) -> str:
    more = ", …" if len(lines) > LINES_NAMED else ""
    return f"line{'' if len(lines) == 1 else 's'} {', '.join(map(str, lines[:LINES_NAMED]))}{more}"
