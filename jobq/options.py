"""The options of a run: what ``jobq run`` takes as options, `Pipeline.run` takes as keywords."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobq.errors import PipelineError

Workers: TypeAlias = Annotated[int, Field(ge=1)] | Literal["auto"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]


class RunOptions(BaseModel):
    """
    How to run a pipeline. Seconds are floats.

    ``workers``: consumers' workers, a number or "auto", for all or by stage. ``input``: JSON lines in place
    of the producers ("-": standard input). ``output``: results as JSON lines ("-": standard output).
    ``dead_letters``: a JSON line for each dead letter; the file is made with the first one.
    ``timeout``: seconds for the whole run; then it gives up. ``shutdown_timeout``: the grace for a stop.
    ``log_level`` and ``log_format``: None leaves logging as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str = "joinable"
    start_method: Literal["auto", "fork", "forkserver", "spawn"] = "auto"
    workers: Workers | dict[str, Workers] | None = None
    input: Path | None = None
    output: Path | None = None
    collect: bool = False
    check: bool = True
    max_failures: int | None = Field(default=None, ge=1)
    fail_fast: bool = False
    dead_letters: Path | None = None
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    shutdown_timeout: float = Field(default=30.0, ge=0)
    progress: bool = False
    log_level: LogLevel | None = None
    log_format: Literal["console", "json"] | None = None

    @property
    def failure_limit(self) -> int | None:
        """The number of dead letters at which nothing new starts."""
        return 1 if self.fail_fast else self.max_failures


#: Options of the contract that no version has yet: named, so that nobody takes one for a parameter.
NOT_YET = frozenset({"address", "journal", "journal_sync", "report", "resume", "trace"})


def read_run_options(given: dict[str, Any]) -> RunOptions:
    """Return *given* as options; raises `PipelineError` that lists every wrong one."""
    try:
        return RunOptions(**given)
    except ValidationError as error:
        raise PipelineError(*(_wrong_option(*wrong) for wrong in wrong_values(error))) from None


def _wrong_option(name: str, value: Any, message: str) -> str:
    known = RunOptions.model_fields
    if name.partition(".")[0] in known:
        return f"run option {name}={value!r}: {message}."
    if name in NOT_YET:
        return f"run option {name!r} is not built yet."
    return f"there is no run option {name!r}{suggest(name, known)}; there are {', '.join(known)}."


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return which of the *known* names was probably meant by *name*; None if that can't be told."""
    import difflib  # only who has made a mistake pays for it

    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    close += [one for one in names if sorted(one) == sorted(name)]  # too short for two letters in wrong order
    return close[0] if close else None


def suggest(name: str, known: Iterable[str]) -> str:
    """Return what to say of that behind the name, empty if there is nothing to say."""
    close = closest(name, known)
    return "" if close is None else f" (did you mean {close!r}?)"


def wrong_values(error: ValidationError) -> list[tuple[str, Any, str]]:
    """
    Return name, value and what is wrong, once for a value that none of several types would take.

    Of a mapping that is one of these types it is the value in it that is wrong.
    """
    found: dict[str, tuple[Any, list[str]]] = {}
    problems = error.errors()
    for problem in problems:
        place, value = problem["loc"], problem["input"]
        others = [one["loc"] for one in problems if one["loc"][:1] == place[:1] and one["loc"] != place]
        if len(place) < 3 and any(len(other) >= 3 for other in others):
            continue
        name = place if not others else (*place[:1], *place[2:3])  # without the name of the type
        _, messages = found.setdefault(".".join(map(str, name)), (value, []))
        if problem["msg"] not in messages:
            messages.append(problem["msg"])
    return [(name, value, ", or ".join(messages)) for name, (value, messages) in found.items()]


#: Where the command line puts dead letters, unless told.
DEFAULT_NAME = "{pipeline}-{run}.dead.jsonl"


def dead_letter_path(template: Path, *, pipeline: str, run: str) -> Path:
    """Return *template* as a full path, with ``{pipeline}`` and ``{run}`` in its name filled in."""
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in pipeline)
    return template.with_name(template.name.replace("{pipeline}", safe).replace("{run}", run)).absolute()
