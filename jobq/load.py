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
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import TYPE_CHECKING, NoReturn

from jobq.backend import Preload
from jobq.errors import PipelineError

if TYPE_CHECKING:
    from jobq.pipeline import Pipeline

_HERE = str(Path(__file__).parent) + os.sep

_FORMS = "  Give pipeline.py, pipeline.py:variable or package.module:variable."

#: Where the standard library is on ``sys.path``.
_LIBRARY = {str(Path(os.__file__).parent), str(Path(os.__file__).parent / "lib-dynload")}

#: Exit code of a process that was to be a worker and had to import a program without main guard.
UNGUARDED = 77

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
    for a module) is put first on ``sys.path``; behind the standard library if there is something in it by
    the name of a module of it that jobq needs. Raises `PipelineError`.
    """
    import jobq.pipeline  # noqa: F401  # before the folder is on the path, which may hold a json.py

    where, variable = _split(target)
    try:
        preload = _file(Path(where)) if _is_file(where) else Preload("", _module(where), str(Path.cwd()))
    except OSError as error:
        raise PipelineError(f"The target {target!r} can't be read: {error.strerror}.") from error
    _place(preload.folder, Path(preload.path).stem)
    return Loaded(_pick(_load(preload, target), where, variable), preload, target)


def load_preload(preload: Preload) -> None:
    """
    Load in this process what the driver's process has loaded, under the same name.

    For a child that was spawned: to be called before it unpickles anything. Does nothing where the
    module is loaded already.
    """
    if preload.folder not in sys.path:  # multiprocessing hands on the driver's
        _place(preload.folder, Path(preload.path).stem)
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
    """
    Raise `PipelineError` if a pipeline's file is being loaded: every way to run one calls this first.

    Also if a spawned child is importing the program that spawned it: the child then ends with `UNGUARDED`.
    """
    target = _loading.get()
    ours = target is None and _is_child_importing()
    if target is None and not ours:
        return
    when = "a worker process imports it" if ours else f"{target} is being loaded"
    error = PipelineError(
        f"{_caller()} runs a pipeline while {when}.\n"
        '  Put the call behind a main guard: if __name__ == "__main__":'
    )
    if ours:
        _end_without_traceback(error)
    raise error


def _is_child_importing() -> bool:
    """Return whether multiprocessing is importing the parent's program here, in the child."""
    from multiprocessing.process import current_process

    return getattr(current_process(), "_inheriting", False)


def _end_without_traceback(error: PipelineError) -> None:
    """Let *error*, if nobody catches it, end this process with its text alone and `UNGUARDED`."""
    before = sys.excepthook

    def end(kind: type[BaseException], raised: BaseException, trace: TracebackType | None) -> None:
        if raised is not error:
            before(kind, raised, trace)
            return
        with suppress(OSError, ValueError, AttributeError):  # closed, or never there
            sys.stderr.write(f"jobq: {error}\n")
            sys.stderr.flush()
        os._exit(UNGUARDED)

    sys.excepthook = end


def _split(target: str) -> tuple[str, str | None]:
    where, colon, variable = target.rpartition(":")
    if not colon or Path(target).is_file():
        return target, None
    if not where or not variable.isidentifier():
        raise _not_understood(target)
    return where, variable


def _not_understood(target: str) -> PipelineError:
    return PipelineError(f"Target {target!r} is not understood.\n{_FORMS}")


def _is_file(where: str) -> bool:
    if not where:
        return False
    return where.endswith(".py") or os.sep in where or where in (".", "..") or Path(where).is_file()


def _module(name: str) -> str:
    if not all(part.isidentifier() for part in name.split(".")):
        raise _not_understood(name)
    return name


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


def _place(folder: str, stem: str) -> None:
    """Put *folder* first on ``sys.path``, behind the standard library if it would hide what we need of it."""
    # Spawned children get the path before they import us. What we have imported, users' code gets from us
    # anyway; so what they can have of their own, they have, in every process.
    needed = sys.stdlib_module_names & {stem, *sys.modules}
    hides = any(
        Path(folder, file).is_file() for name in needed for file in (f"{name}.py", f"{name}/__init__.py")
    )
    before = [entry for entry in sys.path if hides and entry in _LIBRARY]
    others = [entry for entry in sys.path if entry != folder and entry not in before]
    sys.path[:] = [*before, folder, *others]


def _load(preload: Preload, target: str) -> ModuleType:
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
        if _is_missing(preload, error):
            raise PipelineError(
                f"{target} names no module: {error} (current folder: {Path.cwd()}).\n{_FORMS}"
            ) from error
        raise PipelineError(f"{target} can't be loaded:\n{_users_traceback(error)}") from error


def _is_missing(preload: Preload, error: BaseException) -> bool:
    """Return whether it is the target itself, or a package that it is in, that wasn't found."""
    absent = f"{error.name}." if isinstance(error, ModuleNotFoundError) and not preload.path else None
    return absent is not None and f"{preload.module}.".startswith(absent)


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
