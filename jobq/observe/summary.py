"""What a run did, as a table of at most 80 columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jobq.report import Report, StageCounts

_WIDTH = 80
_CELL = 10


def summary(report: Report, dead_letters: Path | None = None) -> str:
    """Return a table of the stages, and a line on what is left of the run; ends without a line break."""
    columns = _columns(report)
    name_width = max(5, min(max(map(len, report.stages), default=0), _WIDTH - _CELL * len(columns)))
    lines = ["stage".ljust(name_width) + "".join(f"{title:>{_CELL}}" for title in columns)]
    for name, counts in report.stages.items():
        cells = "".join(f"{cell(counts):>{_CELL}}" for cell in columns.values())
        lines.append(_cut(name, name_width).ljust(name_width) + cells)
    return "\n".join([*lines, *_notes(report, dead_letters)])


def _columns(report: Report) -> dict[str, Callable[[StageCounts], str]]:
    seconds = report.seconds
    columns: dict[str, Callable[[StageCounts], str]] = {
        "done": lambda counts: number(counts.done),
        "filtered": lambda counts: number(counts.filtered),
        "dead": lambda counts: number(counts.dead),
        "cancelled": lambda counts: number(counts.cancelled),
        "retried": lambda counts: number(counts.retried),
        "busy": lambda counts: duration(counts.busy_seconds),
        "rate": lambda counts: rate(counts.done / seconds if seconds > 0 else 0.0),
    }
    if not any(counts.cancelled for counts in report.stages.values()):
        del columns["cancelled"]
    return columns


def _notes(report: Report, dead_letters: Path | None) -> list[str]:
    stages = report.stages.values()
    results = sum(edge.received for edge in report.edges if edge.target is None)
    notes = [
        f"{report.pipeline}, run {report.run}: {duration(report.seconds)}, {_counted(results, 'result')}"
    ]
    restarts, redelivered = sum(s.worker_restarts for s in stages), sum(s.redelivered for s in stages)
    if restarts or redelivered:
        again = f"{_counted(redelivered, 'job')} delivered again"
        notes.append(f"{_counted(restarts, 'worker')} replaced, {again}")
    dead, cancelled = sum(s.dead for s in stages), sum(s.cancelled for s in stages)
    given_up = []
    if dead:
        given_up.append(_counted(dead, "dead letter"))
    if cancelled:
        given_up.append(f"{number(cancelled)} cancelled")
    if given_up:
        where = f" in {dead_letters}" if dead_letters else ""
        notes.append(f"{', '.join(given_up)}{where}")
    return notes


def _counted(count: int, noun: str) -> str:
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def number(count: float) -> str:
    """Return *count* in at most eight characters."""
    if count < 1_000_000:
        return f"{count:,.0f}"
    for unit in ("M", "G"):
        count /= 1_000 if unit == "G" else 1_000_000
        if count < 1_000:
            return f"{count:.1f}{unit}"
    return f"{count:,.0f}G"


def rate(per_second: float) -> str:
    """Return how many a second, in at most eight characters."""
    return f"{per_second:.1f}/s" if per_second < 1_000 else f"{_short(per_second)}/s"


def _short(count: float) -> str:
    for unit in ("", "k", "M"):
        if count < 1_000:
            return f"{count:.1f}{unit}"
        count /= 1_000
    return f"{count:.0f}G"


def duration(seconds: float) -> str:
    """Return a span of time in at most eight characters."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours:,}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
