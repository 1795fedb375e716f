"""`jobq.map`: one function over many items, in the calling program's loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any

from jobq.errors import PipelineError, Skip
from jobq.options import NOT_YET, RunOptions, suggest
from jobq.pipeline import Pipeline
from jobq.stage import ConsumerOptions

Function = Callable[..., Any]


def _name(function: Function) -> str:
    return getattr(function, "__name__", type(function).__name__)


class Mapped:
    """A function as a stage that takes and gives anything: its own annotations don't matter."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.__name__ = _name(function)

    @property
    def __code__(self) -> CodeType:
        """The function's, so that messages say where it is."""
        code: CodeType = inspect.unwrap(self.function).__code__
        return code

    def __call__(self, item: Any) -> Any:
        """Return what the function gives for *item*, None if it raises `Skip`: one output for each input."""
        try:
            return self.function(item)
        except Skip:
            return None


class MappedAsync(Mapped):
    """The same for ``async def``."""

    async def __call__(self, item: Any) -> Any:
        """Return what the function gives for *item*, likewise."""
        try:
            return await self.function(item)
        except Skip:
            return None


def map(  # noqa: A001  # the contract's name: jobq.map
    function: Function, items: Iterable[Any], *, ordered: bool = True, **options: Any
) -> Iterator[Any]:
    """
    Yield ``function(item)`` for each of *items*, computed by workers.

    Lazy on both sides: nothing starts before the first ``next()``, and *items* (which may be endless) is read
    only so far ahead as the stage's queue holds. One output for each input, in order unless *ordered* is
    False. An item that fails raises at its turn and ends the run; leaving the loop stops it. *options* are
    those of a consumer (``workers=``, ``timeout=`` for one item, …) and of a run (``backend=``, …).
    """
    if "batch" in options:
        raise PipelineError(
            f"jobq.map: no batch={options['batch']!r}: it calls {_name(function)}() for each item."
            "\n  A pipeline's consumer takes batches: @pipeline.consumer(batch=...)."
        )
    if "key" in options:
        raise PipelineError("jobq.map: no key=: it gives one output for each input, whatever came before.")
    _refuse_unknown(options)
    stage = {name: options.pop(name) for name in list(options) if name in _CONSUMER_OPTIONS}
    mapped = MappedAsync(function) if _is_async(function) else Mapped(function)
    pipeline = Pipeline(mapped.__name__)
    pipeline.consumer(mapped, **{"validate": False, "ordered": ordered, **stage})
    return _results(pipeline, items, ordered, options)


def _is_async(function: Function) -> bool:
    """Whether *function*, or the class of what is called like one, is async."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _refuse_unknown(options: Iterable[str]) -> None:
    known = {*_CONSUMER_OPTIONS, *RunOptions.model_fields, "ordered"}
    has = f"; it has those of a consumer and of a run: {', '.join(sorted(known - _USELESS))}"
    problems = [
        f"jobq.map has no option {name!r}{_ELSEWHERE.get(name) or suggest(name, known - _USELESS) + has}."
        for name in options
        if name not in known | NOT_YET
    ]
    if problems:
        raise PipelineError(*problems)


def _results(
    pipeline: Pipeline, items: Iterable[Any], ordered: bool, options: dict[str, Any]
) -> Iterator[Any]:
    with pipeline.over(items, ordered=ordered, **options) as results:
        yield from results


#: Options that a map refuses or has no use for, so it offers none of them.
_USELESS = {"key", "batch", "batch_timeout", "check", "collect", "input", "output"}
_WORKERS = ": say by workers= how many there are to be"
_CHUNKS = ": leave it out, the size of chunks adapts by itself to the time that items take"
#: What other libraries have, and what is here instead.
_ELSEWHERE = {
    **dict.fromkeys(("n_jobs", "jobs", "processes", "max_workers", "num_workers", "nprocs"), _WORKERS),
    **dict.fromkeys(("chunksize", "chunk_size", "batch_size", "n_splits"), _CHUNKS),
}
_CONSUMER_OPTIONS = {field.alias or name for name, field in ConsumerOptions.model_fields.items()} - {"params"}
