"""The dead-letter file: a JSON line for each job that was given up."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

from jobq.events import Event, JobDead, RunEnded
from jobq.observe.log import tell
from jobq.observe.text import write_all
from jobq.options import dead_letter_path

_BEFORE_ITEM = ("run", "pipeline", "target", "stage", "job", "key")
_AFTER_ITEM = ("item_type", "status", "attempts", "deliveries", "error", "message", "traceback")


class DeadLetterFile:
    """
    Appends a line for each `JobDead`, at once; the file is made with the first, and closed at the run's end.

    A file that can't be written is told once in the log, and counted in ``unwritten``.
    """

    def __init__(self, template: Path, *, run: str, pipeline: str, target: str | None) -> None:
        self.path = dead_letter_path(template, pipeline=pipeline, run=run)
        self.written = 0
        self.unwritten = 0
        self._run = run
        self._target = target
        self._descriptor: int | None = None
        self._torn = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, JobDead) and not event.undecoded:
            self._write(_line(event, self._target))
        elif isinstance(event, RunEnded):
            self.close()

    def close(self) -> None:
        """Close the file, if it was made."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, line: bytes) -> None:
        try:
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._descriptor = os.open(self.path, flags, 0o666)
            start = b"\n" if self._torn else b""
            self._torn = True
            write_all(self._descriptor, start + line)
            self._torn = False
            self.written += 1
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.unwritten += 1
        if self.unwritten == 1:
            tell(
                "error",
                f"dead letters can't be written to {self.path}: {error.strerror or error}; "
                "the report has the first 10,000 of them",
                run=self._run,
            )


def _line(event: JobDead, target: str | None) -> bytes:
    """Return the letter of *event* as one line. The item is put in as it was made, and not decoded."""
    letter = event.letter
    fields = {name: getattr(letter, name) for name in _BEFORE_ITEM}
    fields["target"] = letter.target or target
    after = {name: getattr(letter, name) for name in _AFTER_ITEM} | {"time": letter.time.isoformat()}
    start, end = json.dumps(fields)[:-1], json.dumps(after)[1:]
    return f"{start}, {_item(event)}, {end}\n".encode("utf-8", "backslashreplace")


def _item(event: JobDead) -> str:
    if event.item_json is not None:
        # A line break between JSON's tokens is white space; inside a string it can't stand.
        return f'"item": {event.item_json.replace(chr(10), " ").replace(chr(13), " ")}'
    if event.item_pickle is not None:
        return f'"item_pickle": "{base64.b64encode(event.item_pickle).decode()}"'
    return '"item": null'
