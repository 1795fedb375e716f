"""Loading a pipeline: the file or module that a target names, under one name in every process."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import keyword
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, NoReturn

from jobq.backend import Preload
from jobq.errors import PipelineError

if TYPE_CHECKING:
    from jobq.pipeline import Pipeline

_HERE = str(Path(__file__).parent) + os.sep

#: The target being loaded; None while none is.
_loading: ContextVar[str | None] = ContextVar("loading", default=None)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline, what a spawned child has to load before it unpickles, and the target as given."""

    pipeline: Pipeline
    preload: Preload | None
    target: str


def load_target(target: str) -> Loaded:
    """
    Return the pipeline that *target* names.

    *target* is ``pipeline.py``, ``pipeline.py:variable`` or ``package.module:variable``; without a
    variable it is the one Pipeline among the module's variables. The file's folder (the current one
    for a module) is put first on ``sys.path``. Raises `PipelineError`.
    """
    where, variable = _split(target)
    preload = _file(Path(where)) if _is_file(where) else Preload("", where, str(Path.cwd()))
    return Loaded(_pick(_load(preload, target), where, variable), preload, target)


def load_preload(preload: Preload) -> None:
    """
    Load in this process what the driver's process has loaded, under the same name.

    For a child that was spawned: to be called before it unpickles anything. Does nothing where the
    module is loaded already.
    """
    _load(preload, preload.path or preload.module)


@contextmanager
def loading(target: str) -> Iterator[None]:
    """Running a pipeline is refused inside the ``with``."""
    token = _loading.set(target)
    try:
        yield
    finally:
        _loading.reset(token)


def is_loading() -> bool:
    """Whether a pipeline's file is being loaded here."""
    return _loading.get() is not None


def refuse_while_loading() -> None:
    """Raise `PipelineError` if a pipeline's file is being loaded: every way to run one calls this first."""
    target = _loading.get()
    if target is not None:
        raise PipelineError(
            f"{_caller()} runs a pipeline while {target} is being loaded.\n"
            '  Put the call behind a main guard: if __name__ == "__main__":'
        )


def _split(target: str) -> tuple[str, str | None]:
    where, colon, variable = target.rpartition(":")
    if not colon or Path(target).is_file():
        return target, None
    if not where or not variable.isidentifier():
        raise PipelineError(
            f"Target {target!r} is not understood.\n"
            "  Give pipeline.py, pipeline.py:variable or package.module:variable."
        )
    return where, variable


def _is_file(where: str) -> bool:
    return where.endswith(".py") or os.sep in where or Path(where).is_file()


def _file(path: Path) -> Preload:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise PipelineError(f"The file {path} {what} (current folder: {Path.cwd()}).")
    path = path.resolve()
    name = next(name for name in _names(path.stem) if _is_free(name, path))
    return Preload(path=str(path), module=name, folder=str(path.parent))


def _names(stem: str) -> Iterator[str]:
    """Yield the names that the module of a file may get, the best first."""
    if stem.isidentifier() and not keyword.iskeyword(stem):
        yield stem
    identifier = "".join(letter if f"_{letter}".isidentifier() else "_" for letter in stem)
    yield f"jobq_pipeline_{identifier}"
    for number in itertools.count(2):
        yield f"jobq_pipeline_{identifier}_{number}"


def _is_free(name: str, path: Path) -> bool:
    """Return whether nothing but the file at *path* goes by *name*."""
    if name in sys.modules:
        return _is_module_of(getattr(sys.modules[name], "__file__", None), path)
    if name in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is None or _is_module_of(spec.origin, path)


def _is_module_of(origin: str | None, path: Path) -> bool:
    return origin is not None and Path(origin).resolve() == path


def _load(preload: Preload, target: str) -> ModuleType:
    if preload.folder not in sys.path[:1]:
        sys.path.insert(0, preload.folder)
    if preload.module in sys.modules:
        return sys.modules[preload.module]
    try:
        with loading(target):
            if not preload.path:
                return importlib.import_module(preload.module)
            return _execute(preload)
    except PipelineError:
        raise
    except (Exception, SystemExit) as error:
        raise PipelineError(f"{target} can't be loaded:\n{_users_traceback(error)}") from error


class _Source(SourceFileLoader):
    """Reads the source each time: bytecode is stale for a file that was changed twice in a second."""

    def path_stats(self, path: object) -> NoReturn:
        raise OSError(f"no bytecode is kept for {path}")


def _execute(preload: Preload) -> ModuleType:
    loader = _Source(preload.module, preload.path)
    spec = importlib.util.spec_from_file_location(preload.module, preload.path, loader=loader)
    assert spec is not None  # a loader was given
    module = importlib.util.module_from_spec(spec)
    sys.modules[preload.module] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[preload.module]
        raise
    return module


def _pick(module: ModuleType, where: str, variable: str | None) -> Pipeline:
    from jobq.pipeline import Pipeline

    found = {name: value for name, value in vars(module).items() if isinstance(value, Pipeline)}
    if variable is not None:
        if variable in found:
            return found[variable]
        raise PipelineError(_no_such_variable(module, where, variable, sorted(found)))
    different = {id(pipeline): pipeline for pipeline in found.values()}
    if len(different) == 1:
        return next(iter(different.values()))
    if not different:
        raise PipelineError(
            f"{where} has no Pipeline among its variables.\n"
            f'  Add one: pipeline = Pipeline("{Path(where).stem}")'
        )
    raise PipelineError(
        f"{where} has {len(different)} pipelines: {', '.join(found)}.\n"
        f"  Say which: {where}:{next(iter(found))}"
    )


def _no_such_variable(module: ModuleType, where: str, variable: str, pipelines: list[str]) -> str:
    if hasattr(module, variable):
        problem = f"{variable} in {where} is a {type(getattr(module, variable)).__name__}, not a Pipeline."
    else:
        problem = f"{where} has no variable {variable}."
    return f"{problem}\n  Its pipelines: {', '.join(pipelines) or 'none'}."


def _users_traceback(error: BaseException) -> str:
    """Return the traceback of *error* without the frames of jobq and of the import system."""
    told = traceback.TracebackException.from_exception(error)
    seen: set[int] = set()
    pending: list[traceback.TracebackException | None] = [told]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        users = [frame for frame in one.stack if _is_users(frame.filename)]
        one.stack = traceback.StackSummary.from_list(users)
        pending += [one.__cause__, one.__context__, *(one.exceptions or ())]
    return "".join(told.format()).rstrip()


def _is_users(filename: str) -> bool:
    return not filename.startswith((_HERE, "<frozen importlib"))


def _caller() -> str:
    """Return ``file.py:line`` of the innermost frame that is not jobq's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return "Something" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


__all__ = ["Loaded", "is_loading", "load_preload", "load_target", "loading", "refuse_while_loading"]
