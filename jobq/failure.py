"""A failed job as text: what the driver, the log and the dead letter can always show."""

from __future__ import annotations

import pickle
import traceback
from pathlib import Path
from typing import Any

from jobq.errors import PayloadError, Reject, Retry
from jobq.wire import PROTOCOL, Failure

#: A traceback is cut to so many characters: a runaway recursion would otherwise fill the log.
TRACEBACK_CHARACTERS = 20_000
REPR_CHARACTERS = 200
_HERE = str(Path(__file__).parent)


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


def failure_of(
    index: int, error: BaseException, item: Any, retry_on: tuple[type[BaseException], ...]
) -> Failure:
    """Return what *error*, raised by the job at *index*, is to the driver."""
    verdict, delay, message = "error", None, safe_text(error)
    if isinstance(error, Retry):
        verdict, delay, message = "retry", error.delay, "the job asked for another try"
    elif isinstance(error, Reject):
        verdict, message = "reject", safe_text(error.reason)
    elif isinstance(error, PayloadError):
        verdict = "payload"
    return Failure(
        index,
        verdict,
        type(error).__name__,
        message,
        _traceback(error),
        isinstance(error, retry_on),
        delay,
        exception=_pickled(error),
        **describe_item(item),
    )


def refusal(index: int, message: str, item: Any) -> Failure:
    """Return the failure of an item that its stage can't take: never retried."""
    error = PayloadError(message)
    return Failure(
        index, "payload", "PayloadError", message, "", exception=_pickled(error), **describe_item(item)
    )


def describe_item(item: Any) -> dict[str, Any]:
    """Return type, JSON form (None if it has none) and a safe repr of *item*."""
    return {"item_type": type(item).__qualname__, "item_json": json_text(item), "item_repr": safe_repr(item)}


def json_text(item: Any) -> str | None:
    """Return *item* as JSON text, or None if it has no JSON form."""
    from pydantic_core import to_json

    try:
        return to_json(item, inf_nan_mode="null").decode()
    except BaseException:  # user code may run in it (serializers)
        return None


def _traceback(error: BaseException) -> str:
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None and tb.tb_frame.f_code.co_filename.startswith(_HERE):
        tb = tb.tb_next  # jobq's own frames say nothing to the user
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
