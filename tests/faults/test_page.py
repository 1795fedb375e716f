"""The page of faults is whole, and says what the tests say."""

from __future__ import annotations

from tests.faults.page import PAGE, collect, text
from tests.faults.rows import ROWS

#: The rows of the catalogue that the project set out with; those that were found later come on top.
CATALOGUE = {"A": 19, "B": 30, "C": 15, "D": 7, "E": 13}


def test_every_row_of_the_catalogue_has_a_test_or_a_reason() -> None:
    collect()

    names = {f"{letter}{number + 1}" for letter, count in CATALOGUE.items() for number in range(count)}

    assert names <= ROWS.keys(), f"no test, no reason: {sorted(names - ROWS.keys())}"


def test_the_page_is_what_the_rows_say() -> None:
    collect()

    assert PAGE.read_text(encoding="utf-8") == text(), "write it again: python -m tests.faults"
