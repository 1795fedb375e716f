"""
jobq's own log (`tell`), and the jobs' (``job.log``, structlog): both on top of the standard logger "jobq".

An embedding program's logging is left alone: nothing is configured here until `configure` is called,
and then only the logger "jobq" is.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import sys
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal

from jobq.observe.text import plain, safe_repr, write

if TYPE_CHECKING:
    import structlog

#: Where the cursor stands while a live display is drawn, this clears it.
CLEAR = "\r\x1b[J"

_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}

#: Fields that a line on the console shows elsewhere, or that would repeat in each.
_NOT_SHOWN = {"run", "stage"}

#: Control characters in what users log would move the cursor or worse.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

_standard = logging.getLogger("jobq")
_standard.addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class LogSettings:
    """
    How lines look and which are written; the same in every process of a run.

    ``live``: a progress display stands on the terminal, and is cleared before each line.
    """

    level: str = "info"
    format: Literal["console", "json"] = "console"
    colour: bool = False
    live: bool = False


def read_log_settings(
    level: str | None,
    format: Literal["console", "json"] | None,  # noqa: A002  # the option's name
    stream: IO[str] | None = None,
    *,
    live: bool = False,
) -> LogSettings | None:
    """
    Return settings for *stream* (standard error): console on a terminal, else JSON lines.

    None where neither *level* nor *format* is given: logging stays as it is.
    """
    if level is None and format is None:
        return None
    terminal = is_terminal(stream or sys.stderr)
    return LogSettings(
        level=level or "info",
        format=format or ("console" if terminal else "json"),
        colour=terminal,
        live=live and terminal,
    )


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether *stream* is open on a terminal that knows how to move its cursor."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def configure(settings: LogSettings | None, stream: IO[str] | None = None) -> Callable[[], None]:
    """
    Let the logger "jobq" write lines to *stream* (standard error) in this process.

    Returns a function that puts the logger back as it was. None changes nothing.
    """
    if settings is None:
        return lambda: None
    before = (_standard.handlers[:], _standard.level, _standard.propagate)
    _standard.handlers = [_Handler(settings, stream)]
    _standard.setLevel(settings.level.upper())
    _standard.propagate = False

    def restore() -> None:
        _standard.handlers, level, _standard.propagate = before
        _standard.setLevel(level)

    return restore


def tell(level: str, sentence: str, said: dict[str, Any] | None = None, **fields: Any) -> None:
    """Write a line of jobq's own, with *fields* beside the sentence; it has *said* in words."""
    number = logging.getLevelNamesMapping()[level.upper()]
    if _standard.isEnabledFor(number):
        _standard.log(number, Line(sentence, fields, said))


def logger(**bound: Any) -> structlog.stdlib.BoundLogger:
    """Return a logger whose lines carry *bound*."""
    import structlog  # takes longer than a run of a moment: only where jobs log

    log: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        _standard,
        processors=[structlog.stdlib.filter_by_level, _positional, _to_record],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=False,
        **bound,
    )
    return log


def job_logger(*, run: str, stage: str, job: int, attempt: int) -> Any:
    """Return ``job.log``: its lines carry where they come from."""
    return logger(run=run, stage=stage, worker=_worker_name(), job=job, attempt=attempt)


def _worker_name() -> str:
    """Return the name of the worker that we are: its process bears it, or where it has none, its thread."""
    from multiprocessing import current_process, parent_process
    from threading import current_thread

    return current_process().name if parent_process() is not None else current_thread().name


class Line:
    """
    What a log record of jobq's holds as its message: a sentence and its fields.

    ``said`` are the fields that the sentence has in words: shown where lines are read by programs.
    """

    __slots__ = ("event", "fields", "said")

    def __init__(self, event: str, fields: dict[str, Any], said: dict[str, Any] | None = None) -> None:
        self.event = event
        self.fields = fields
        self.said = said or {}

    def __str__(self) -> str:
        return " ".join([self.event, *(f"{name}={_shown(value)}" for name, value in self.fields.items())])


def _positional(_: Any, __: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put positional arguments into the sentence; where they don't fit, beside it."""
    arguments = fields.pop("positional_args", ())
    if arguments:
        try:
            fields["event"] = str(fields["event"]) % arguments
        except KeyboardInterrupt:
            raise
        except BaseException:  # a user's __str__ may raise anything
            fields["arguments"] = arguments
    return fields


def _to_record(_: Any, __: str, fields: MutableMapping[str, Any]) -> tuple[tuple[Line], dict[str, Any]]:
    """Return what the standard logger's method is called with."""
    passed = {name: fields.pop(name) for name in ("exc_info", "stack_info", "stacklevel") if name in fields}
    event = fields.pop("event", "")
    return (Line(event if isinstance(event, str) else safe_repr(event), dict(fields)),), passed


class _Handler(logging.Handler):
    """Writes each record as one line, in one write, and never raises."""

    def __init__(self, settings: LogSettings, stream: IO[str] | None) -> None:
        super().__init__()
        self._stream = stream
        self._clear = CLEAR if settings.live else ""
        self._render = _as_json if settings.format == "json" else _as_console
        self._colour = settings.colour

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._render(record, self._colour)
        except Exception as error:
            line = f"a log line can't be shown: {type(error).__name__}"
        write(self._stream or sys.stderr, f"{self._clear}{line}\n")


def _line(record: logging.LogRecord) -> Line:
    if isinstance(record.msg, Line):
        return record.msg
    try:
        return Line(record.getMessage(), {})
    except Exception:
        return Line(safe_repr(record.msg), {"arguments": record.args})


def _trace(record: logging.LogRecord) -> str | None:
    if record.exc_info and record.exc_info[0] is not None:
        try:
            return logging.Formatter().formatException(record.exc_info).rstrip()
        except Exception:
            return record.exc_info[0].__name__
    return None


def _as_json(record: logging.LogRecord, _: bool) -> str:
    line = _line(record)
    told = {"time": _utc(record.created), "level": record.levelname.lower(), "event": line.event}
    trace = _trace(record)
    if trace:
        told["traceback"] = trace
    for name, value in plain(line.said | line.fields).items():
        told[f"{name}_" if name in told else name] = value
    return json.dumps(told)


def _as_console(record: logging.LogRecord, colour: bool) -> str:
    line, level = _line(record), record.levelname.lower()
    fields = {name: value for name, value in line.fields.items() if name not in _NOT_SHOWN}
    who = line.fields.get("stage", "jobq")
    shown = f"\x1b[{_COLOURS.get(level, '0')}m{level:<8}\x1b[0m" if colour else f"{level:<8}"
    clock = time.strftime("%H:%M:%S", time.localtime(record.created))
    trace = line.said.get("traceback") or _trace(record)
    text = f"{who}: {Line(line.event, fields)}" + (f"\n{str(trace).rstrip()}" if trace else "")
    return f"{clock} {shown} {text.translate(_VISIBLE)}"


def _shown(value: object) -> str:
    return value if isinstance(value, str) and value.isprintable() and " " not in value else safe_repr(value)


def _utc(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat()
