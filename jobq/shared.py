"""
Run-scoped resources as jobs see them: a `Proxy` that has every operation done by whoever keeps the object.

    proxy["a"] = 1 ── ("counts", "setitem", ("a", 1)) ──> Board.perform, one at a time ──> the object

Arguments and what comes back are copies (by reference where workers are threads). One operation is one step
that nothing interrupts; ``proxy["a"] += 1`` is two, so hold a `jobq.Lock` around it.
"""

from __future__ import annotations

import contextlib
import operator
import pickle
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from functools import partial
from typing import Any

from jobq.errors import EndOfChannel, JobqError, PayloadError
from jobq.failure import failure_of, safe_text
from jobq.letters import RemoteTraceback
from jobq.locks import ThreadPlace, here
from jobq.wire import PROTOCOL

#: A worker whose keeper is gone is ended by its driver, which sees it too; it waits so long for that.
KEEPER_GRACE_SECONDS = 5.0

_VIEWS = (KeysView, ValuesView, ItemsView)


class _Method:
    """Stands for an attribute that is to be called where it is."""


METHOD = _Method


def _attribute(kept: Any, name: str) -> Any:
    value = getattr(kept, name)
    return METHOD if callable(value) else value


def _call(kept: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    value = getattr(kept, name)(*args, **kwargs)
    return list(value) if isinstance(value, _VIEWS) else value


OPERATIONS: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "contains": operator.contains,
    "len": len,
    "bool": bool,
    "list": list,
    "repr": repr,
    "str": str,
    "eq": operator.eq,
    "attribute": _attribute,
    "call": _call,
    "set": setattr,
}


class Board:
    """The objects that are kept, and the way to them: one operation at a time."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self._kept = kept
        self._one_at_a_time = threading.RLock()

    def perform(self, name: str, what: str, *args: Any, **kwargs: Any) -> Any:
        """Return what the operation *what* gives on the object *name*."""
        with self._one_at_a_time:
            kept = self._kept[name]
            if what in ("attribute", "set") and args[0] == "value" and not hasattr(kept, "value"):
                if what == "set":  # a number: there is nothing else in which it could be changed
                    self._kept[name] = args[1]
                return kept
            return OPERATIONS[what](kept, *args, **kwargs)

    def answer(self, request: memoryview) -> bytes:
        """Return the pickled outcome of a pickled request, whatever happens."""
        try:
            name, what, args, kwargs = pickle.loads(request)
            value = self.perform(name, what, *args, **kwargs)
            try:
                return pickle.dumps((True, value), PROTOCOL)
            except Exception as error:
                method = args[0] if what in ("call", "attribute") else what
                raise PayloadError(
                    f"what {name}.{method} gives cannot be pickled: {type(error).__name__}:"
                    f" {safe_text(error)}. It is kept in a process of its own: let a method return plain data"
                ) from error
        except BaseException as error:  # user code: its error belongs to whoever asked
            failure = failure_of(0, error, None, ())
            told = (failure.error, failure.message, failure.traceback, failure.exception)
            return pickle.dumps((False, told), PROTOCOL)


def _rebuild(error: str, message: str, traceback: str, pickled: bytes | None) -> BaseException:
    """Return the exception that was raised where the object is kept, with its traceback as its cause."""
    raised: BaseException = JobqError(f"{error}: {message}")
    with contextlib.suppress(BaseException):  # user code: an exception that pickles but does not unpickle
        loaded = pickle.loads(pickled or b"")
        raised = loaded if isinstance(loaded, BaseException) else raised
    raised.__cause__ = RemoteTraceback(traceback)
    return raised


def _ask(name: str, what: str, *args: Any, **kwargs: Any) -> Any:
    place = here(f"the run-scoped resource {name!r}")
    if isinstance(place, ThreadPlace):
        if place.perform is None:
            raise JobqError(f"the run-scoped resource {name!r} is closed: the run has ended")
        return place.perform(name, what, *args, **kwargs)
    place.flush()
    request = pickle.dumps((name, what, args, kwargs), PROTOCOL)
    try:
        with place.keeper.line() as line:
            line.send(request)
            answer = line.receive()
    except (ConnectionError, EndOfChannel) as error:
        time.sleep(KEEPER_GRACE_SECONDS)  # the job is not to blame: it is cancelled with the run
        raise JobqError(f"the process that keeps the run-scoped resource {name!r} is gone") from error
    fine, value = pickle.loads(answer)
    if not fine:
        raise _rebuild(*value)
    return value


class Proxy:
    """
    Stands for a run-scoped resource in a job: items, ``len``, ``in``, iteration over a copy, public methods.

    A number is read and set as ``.value``.
    """

    __slots__ = ("_methods", "_name")
    _name: str
    _methods: set[str]

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_methods", set())

    def __reduce__(self) -> tuple[Any, ...]:
        return Proxy, (self._name,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{name!r} of the run-scoped resource {self._name!r} is not public")
        if name not in self._methods:
            value = _ask(self._name, "attribute", name)
            if value is not METHOD:
                return value
            self._methods.add(name)
        return partial(_ask, self._name, "call", name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise AttributeError(f"{name!r} of the run-scoped resource {self._name!r} is not public")
        _ask(self._name, "set", name, value)

    def __getitem__(self, key: Any) -> Any:
        return _ask(self._name, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self._name, "setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        _ask(self._name, "delitem", key)

    def __contains__(self, value: Any) -> bool:
        return bool(_ask(self._name, "contains", value))

    def __len__(self) -> int:
        return int(_ask(self._name, "len"))

    def __bool__(self) -> bool:
        return bool(_ask(self._name, "bool"))

    def __iter__(self) -> Iterator[Any]:
        return iter(_ask(self._name, "list"))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Proxy):
            return self._name == other._name
        return bool(_ask(self._name, "eq", other))

    __hash__ = None  # type: ignore[assignment]  # it can change, as what it stands for can

    def __str__(self) -> str:
        return str(_ask(self._name, "str"))

    def __repr__(self) -> str:
        try:
            return f"<run-scoped {self._name}: {_ask(self._name, 'repr')}>"
        except JobqError:  # outside its run
            return f"<run-scoped {self._name}>"
