"""Text that can't raise: what is logged, drawn and written about a run never ends the run."""

from __future__ import annotations

import contextlib
import os
from typing import IO, Any

#: How much of a value is shown.
LONGEST_REPR = 200
#: How deep containers are followed into a JSON log line.
DEEPEST = 6


def safe_repr(value: object) -> str:
    """Return a short repr of *value*, whatever its ``__repr__`` does."""
    if type(value) is int and value.bit_length() > 1000:
        return f"<int, {value.bit_length():,} bits>"  # repr() refuses more than 4300 digits
    try:
        shown = repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"<{type(value).__name__}, its repr raises {type(error).__name__}>"
    if len(shown) > LONGEST_REPR:
        shown = f"{shown[: LONGEST_REPR - 1]}…"
    return str(shown)


def plain(value: Any, depth: int = 0) -> Any:
    """Return *value* as what JSON can say; what it can't is a repr."""
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if value.bit_length() <= 1000 else safe_repr(value)
    if kind is float:
        return value if value - value == 0 else str(value)  # nan and inf are no JSON
    if kind in (list, tuple) and depth < DEEPEST:
        return [plain(one, depth + 1) for one in value]
    if kind is dict and depth < DEEPEST:
        return {_name(key): plain(one, depth + 1) for key, one in value.items()}
    return safe_repr(value)


def _name(key: object) -> str:
    return key if type(key) is str else safe_repr(key)


def write(stream: IO[str] | None, text: str) -> bool:
    """
    Write *text* to *stream* at once; returns whether that worked, and never raises.

    A stream with a descriptor gets one ``write`` per call, so lines of several processes don't mix.
    """
    try:
        if stream is None:
            return False
        try:
            descriptor = stream.fileno()
        except (OSError, AttributeError, ValueError):
            stream.write(text.encode("utf-8", "backslashreplace").decode())
            stream.flush()
            return True
        with contextlib.suppress(RuntimeError):  # a signal came while it was being written to
            stream.flush()
        encoding = getattr(stream, "encoding", None) or "utf-8"
        write_all(descriptor, text.encode(encoding, "backslashreplace"))
    except (OSError, ValueError, LookupError):  # closed, full, gone
        return False
    return True


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of *data*; raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
