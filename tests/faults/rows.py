"""A row of `docs/faults.md`: declared on the test that proves it, so that neither can be there alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., Any])

#: The chapters of the page, by the first letter of a row's name.
CHAPTERS = {
    "A": "A worker dies or stops",
    "B": "Items, producers, and what lies on the wire",
    "C": "The end of the program",
    "D": "Jobs that change their process",
    "E": "Limits of the machine, and start methods",
}


@dataclass(slots=True)
class Row:
    """
    One fault, as the page tells it.

    *name* is a chapter's letter and a number: ``A3``. *exit* is the exit code of ``jobq run``; None where the
    fault does not end a run in one way, and *sees* says what the code depends on. *why_not* is the reason
    where nothing is done about the fault or no test of ours can show it.
    """

    name: str
    fault: str
    items: str
    sees: str
    exit: int | None = None
    why_not: str | None = None
    tests: list[str] = field(default_factory=list)


ROWS: dict[str, Row] = {}


def fault(name: str, fault: str, *, items: str, sees: str, exit: int | None = None) -> Callable[[Test], Test]:  # noqa: A002
    """Say that the test decorated is the proof of this row."""
    if name in ROWS:
        raise ValueError(f"there are two rows {name}: a further test of it is marked @proves({name!r})")
    ROWS[name] = Row(name, fault, items, sees, exit)
    return proves(name)


def proves(name: str) -> Callable[[Test], Test]:
    """Say that the test decorated is one more proof of the row *name*, which is declared already."""
    row = ROWS[name]

    def decorate(test: Test) -> Test:
        row.tests.append(f"{test.__module__.removeprefix('tests.').replace('.', '/')}.py::{test.__name__}")
        marked: Test = pytest.mark.fault(name)(test)
        return marked

    return decorate


def out_of_reach(name: str, fault: str, *, why: str, items: str = "", sees: str = "") -> None:
    """Name a fault about which nothing is done, or that no test can show, with the reason."""
    if name in ROWS:
        raise ValueError(f"there is a row {name} already")
    ROWS[name] = Row(name, fault, items, sees, why_not=why)
