"""
The live display: a line per stage on a terminal, while the run goes on.

Workers and the user's jobs write to the same terminal, so the cursor always rests at the display's
upper left, on an empty line: what others write pushes the display down, and the next tick draws it
anew below. (rich draws the lines; its own Live rests at the lower end, where a line of another
process would tear it.)
"""

from __future__ import annotations

import os
import sys
from collections import deque
from typing import IO, TypeGuard

from jobq.events import Event, Progress, RunEnded, Tick
from jobq.observe.log import CLEAR, is_terminal
from jobq.observe.summary import duration, number, rate
from jobq.observe.text import write
from jobq.report import StageCounts

#: Seconds over which a rate is taken.
WINDOW = 3.0
_WIDE = 300


class LiveProgress:
    """Draws each `Tick` on *stream* (standard error), if that is a terminal; cleared at the end."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._on = is_terminal(self._stream)
        self._totals: dict[tuple[str, str], float] = {}
        self._past: dict[str, deque[tuple[float, int]]] = {}
        self._drawn = False

    def __call__(self, event: Event) -> None:
        if not self._on:
            return
        if isinstance(event, Tick):
            self._draw(event)
        elif isinstance(event, Progress) and event.job is None and _is_count(event.total):
            self._totals[event.stage, event.worker] = event.total
        elif isinstance(event, RunEnded):
            self.close()

    def close(self) -> None:
        """Leave the terminal without the display. Idempotent."""
        if self._drawn:
            write(self._stream, CLEAR)
        self._drawn = self._on = False

    def _draw(self, tick: Tick) -> None:
        if not _in_foreground(self._stream):
            return
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):  # the terminal is gone
            return
        rows = {name: self._row(name, counts, tick.seconds) for name, counts in tick.stages.items()}
        # One line and one column less than there are: a full screen would scroll, a full line wrap.
        lines = ["", *_lines(rows, max(10, (size.columns or 80) - 1))][: (size.lines or 24) - 1]
        if len(lines) < 2:
            return
        up = f"\x1b[{len(lines) - 1}A"
        write(self._stream, CLEAR + "\n".join(lines) + "\r" + up)
        self._drawn = True

    def _row(self, name: str, counts: StageCounts, now: float) -> tuple[str, ...]:
        finished = counts.done + counts.filtered + counts.dead + counts.cancelled
        speed = self._speed(name, finished, now)
        total = sum(total for (stage, _), total in self._totals.items() if stage == name)
        left = total - finished
        return (
            number(finished),
            rate(speed),
            f"{min(finished / total, 1):.0%}" if total > 0 else "",
            f"{duration(left / speed)} left" if total > 0 and left > 0 and speed > 0 else "",
            f"{number(counts.queued)} queued" if counts.queued else "",
            f"{number(counts.in_flight)} in flight" if counts.in_flight else "",
            f"{number(counts.dead)} dead" if counts.dead else "",
        )

    def _speed(self, name: str, finished: int, now: float) -> float:
        past = self._past.setdefault(name, deque([(0.0, 0)]))
        past.append((now, finished))
        while len(past) > 2 and now - past[0][0] > WINDOW:
            past.popleft()
        since, before = past[0]
        return (finished - before) / (now - since) if now > since else 0.0


def _is_count(total: object) -> TypeGuard[float]:
    """Return whether what a user's producer gave as its total is one."""
    return isinstance(total, int | float) and 0 < total < float("inf")


def _in_foreground(stream: IO[str]) -> bool:
    """Return whether the terminal is ours: a run that was put in the background doesn't draw on it."""
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except (OSError, ValueError):  # not the session's own terminal: nothing else is in front
        return True


def _lines(rows: dict[str, tuple[str, ...]], width: int) -> list[str]:
    """Return the display's lines, cut to be narrower than the terminal."""
    from io import StringIO

    from rich.console import Console
    from rich.segment import Segment, Segments
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True, max_width=width // 3)
    for style in ("green", "", "cyan", "", "", "", "red"):
        table.add_column(style=style, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(*(Text(text) for text in (name, *cells)))
    drawing = StringIO()
    # Drawn wide and then cut: drawn to measure, each column would lose some of its digits.
    console = Console(file=drawing, force_terminal=True, width=_WIDE, height=1000, legacy_windows=False)
    for line in console.render_lines(table, pad=False):
        console.print(Segments([*Segment.adjust_line_length(line, width, pad=False), Segment.line()]))
    return drawing.getvalue().splitlines()
