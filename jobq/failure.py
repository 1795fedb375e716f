"""A failed job as text: what the driver, the log and the dead letter can always show."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from jobq.errors import PayloadError, Reject, Retry
from jobq.validation import json_reader
from jobq.wire import PROTOCOL, Failure, Undecodable

#: A traceback is cut to so many characters: a runaway recursion would otherwise fill the log.
TRACEBACK_CHARACTERS = 20_000
REPR_CHARACTERS = 200
#: What pickle says, and what to do about it.
_HINTS = {
    "'generator'": "give what it yields, one by one",
    "local object": "define it at the top of a module",
    "<lambda>": "define it at the top of a module",
    "cannot pickle": "what can't leave its process is opened by those who need it: @pipeline.resource",
    "through inheritance": "jobq.Lock, jobq.Semaphore and @pipeline.resource(scope='run') can be shared",
}
_HERE = str(Path(__file__).parent) + os.sep


def safe_text(value: object) -> str:
    """Return ``str(value)`` in encodable characters, whatever its ``__str__`` does."""
    try:
        text = str(value)
    except BaseException as error:  # user code
        text = f"<{type(value).__name__}: str() raised {type(error).__name__}>"
    return text.encode("utf-8", "backslashreplace").decode()


def safe_repr(value: object) -> str:
    """Return a short ``repr(value)``, whatever its ``__repr__`` does."""
    try:
        text = repr(value)
    except BaseException as error:  # user code, or an int of more than 4300 digits
        if isinstance(value, int):
            return f"<int, {value.bit_length()} bits>"
        text = f"<{type(value).__name__}: repr() raised {type(error).__name__}>"
    if len(text) > REPR_CHARACTERS:
        text = text[: REPR_CHARACTERS - 1] + "…"
    return text.encode("utf-8", "backslashreplace").decode()


def visible(text: str) -> str:
    """Return *text* with everything escaped that a terminal could take for an order; line breaks too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def add_note(error: BaseException, note: str) -> None:
    """Let *error* say *note*, too, below its message: once, and never raising, whatever its class forbids."""
    with contextlib.suppress(Exception):  # user code: __getattr__
        notes = getattr(error, "__notes__", ())
        notes = [*notes] if isinstance(notes, list | tuple) else []
        if note not in notes:
            BaseException.__setattr__(error, "__notes__", [*notes, note])


def failure_of(
    index: int,
    error: BaseException,
    item: Any,
    retry_on: tuple[type[BaseException], ...],
    form: JsonForm | None = None,
) -> Failure:
    """Return what *error*, raised by the job at *index*, is to the driver; *form*: of the stage's items."""
    verdict, delay, message = "error", None, safe_text(error)
    if isinstance(error, Retry):
        verdict, delay, message = "retry", error.delay, "the job asked for another try"
    elif isinstance(error, Reject):
        verdict, message = "reject", safe_text(error.reason)
    elif isinstance(error, PayloadError):
        verdict = "payload"
    elif isinstance(error, AssertionError) and message.startswith("daemonic processes"):  # multiprocessing's
        message += "; declare the stage with daemon=False"
    return Failure(
        index,
        verdict,
        type(error).__name__,
        message,
        _traceback(error),
        isinstance(error, retry_on),
        delay,
        exception=_pickled(error),
        **describe_item(item, (form or JsonForm()).text(item)),
    )


def refusal(index: int, message: str, item: Any) -> Failure:
    """Return the failure of an item that its stage can't take: never retried."""
    error = PayloadError(message)
    described = describe_item(item, JsonForm().text(item))
    return Failure(index, "payload", "PayloadError", message, "", exception=_pickled(error), **described)


def describe_item(item: Any, item_json: str | None) -> dict[str, Any]:
    """Return type, JSON form and a safe repr of *item*; nothing of what couldn't be loaded."""
    if isinstance(item, Undecodable):
        return {"item_repr": "an item that could not be loaded"}
    return {"item_type": type(item).__qualname__, "item_json": item_json, "item_repr": safe_repr(item)}


class JsonForm:
    """The JSON of items: only where reading it as the *annotation* gives the same item again."""

    def __init__(self, annotation: Any = Any) -> None:
        self._annotation = annotation
        self._read: Callable[[str], Any] | None = None

    def text(self, item: Any) -> str | None:
        """Return *item* as JSON text, or None if it has no JSON form."""
        from pydantic_core import to_json

        if isinstance(item, Iterator):  # it would be used up, and need not end
            return None
        try:
            text = to_json(item, inf_nan_mode="strings").decode()
            return text if same(self.item(text), item) else None
        except BaseException:  # user code may run in it (serializers, validators)
            return None

    def item(self, text: str) -> Any:
        """Return the item that *text* is; raises what its type raises if it is none."""
        if self._read is None:
            self._read = json.loads if self._annotation is Any else json_reader(self._annotation)
        return self._read(text)


def same(one: Any, other: Any) -> bool:
    """Whether two items are equal, and of equal types to the bottom; but an int may stand for a float."""
    if one is other:
        return True
    if type(one) is not type(other):
        return {type(one), type(other)} == {int, float} and bool(one == other)
    if isinstance(one, float):
        return one == other or (one != one and other != other)  # nan
    if isinstance(one, dict):
        one, other = [*one.items()], [*other.items()]
    if isinstance(one, set | frozenset):
        return {(type(each), each) for each in one} == {(type(each), each) for each in other}
    if (fields := _fields(one)) is not None:
        one, other = fields, _fields(other)
    if isinstance(one, list | tuple | collections.deque):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _fields(item: Any) -> list[Any] | None:
    """Return what is in the fields of a model or a dataclass; None: it is neither."""
    from pydantic import BaseModel

    if isinstance(item, BaseModel):
        own = [getattr(item, name, None) for name in type(item).model_fields]
        return [*own, item.__pydantic_extra__, item.__pydantic_private__]
    if dataclasses.is_dataclass(item):
        return [getattr(item, field.name, None) for field in dataclasses.fields(item)]
    return None


def users_frames(error: BaseException) -> TracebackType | None:
    """Return where *error* was raised, without the frames of jobq that stand before the user's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_HERE):
        trace = trace.tb_next
    return trace


def pickling_hint(error: BaseException) -> str:
    """Return what to do about something that can't be pickled, as the end of a sentence; mostly nothing."""
    if isinstance(error, RecursionError):
        return f"; it is nested too deeply (the recursion limit is {sys.getrecursionlimit()})"
    text = safe_text(error)
    return next((f"; {hint}" for words, hint in _HINTS.items() if words in text), "")


def _traceback(error: BaseException) -> str:
    tb = users_frames(error)
    try:
        text = "".join(traceback.format_exception(type(error), error, tb))
    except BaseException:  # user code: __str__, __cause__ …
        text = f"{type(error).__name__} (its traceback could not be formatted)\n"
    if len(text) > TRACEBACK_CHARACTERS:
        half = TRACEBACK_CHARACTERS // 2
        text = f"{text[:half]}\n  …\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()


def _pickled(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error, PROTOCOL)
    except BaseException:  # user code
        return None
