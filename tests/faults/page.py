"""`docs/faults.md`, as the rows on the tests have it."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.faults.rows import CHAPTERS, ROWS, Row

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"

HEAD = """\
# Faults: what happens to the items, and what you see

Made from the tests by `python -m tests.faults`: each row stands on the test that proves it. *Again* means
that the job is given to another worker, up to `max_deliveries` times if it was in hand; *dead*, that it is a
dead letter; *done*, that nothing happens to it. Rows without an exit code don't decide it. `.ci/matrix` tries
them on every process backend and start method, where these make a difference.
"""


def collect() -> None:
    """Have every row declared: import all test modules that may declare one."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"tests.faults.{path.stem}")


def text() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for letter, title in CHAPTERS.items():
        rows = sorted((row for row in ROWS.values() if row.name[0] == letter), key=_number)
        parts.append(f"## {letter}. {title}\n\n| | fault | the items | what you see | exit | proved by |\n")
        parts[-1] += "|---|---|---|---|---|---|\n" + "".join(_line(row) for row in rows)
    return "\n".join(parts)


def _number(row: Row) -> tuple[int, str]:
    digits = "".join(filter(str.isdigit, row.name))
    return int(digits), row.name


def _line(row: Row) -> str:
    tests = "<br>".join(f"`{test}`" for test in row.tests) or f"not tested: {row.why_not}"
    code = "" if row.exit is None else str(row.exit)
    cells = (row.name, row.fault, row.items, row.sees, code, tests)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
