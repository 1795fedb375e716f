"""
Rows of a CSV file made clean: jobq run examples/etl_csv.py -p file=orders.csv -o - | head

Or in a shell pipe, JSON lines to JSON lines: jobq run examples/etl_csv.py --input - -o - <orders.jsonl | sort
The textbook reads `sys.stdin` in a child, where it is empty; its workers print, so that lines mix; the first
bad row stops it, or vanishes in an `except: pass`. Here one process reads, one writes, in the order of the
input; a bad row is a dead letter that names its line and field, and the exit code is 1.
"""

import csv
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import TypedDict

from jobq import Pipeline, Reject

RATES = {"EUR": Decimal(1), "USD": Decimal("0.9"), "GBP": Decimal("1.2")}
pipeline = Pipeline("etl_csv")


class Row(TypedDict):
    """A row as it stands in the file: text."""

    day: str
    amount: str
    currency: str


class Order(TypedDict):
    day: str
    euros: str


@pipeline.producer
def rows(file: Path) -> Iterator[Row]:
    """Give the rows of *file*."""
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            yield Row(day=row["day"], amount=row["amount"], currency=row["currency"])


@pipeline.consumer(workers=2, ordered=True)
def clean(row: Row) -> Order | None:
    """Convert to euros; cancelled orders (without an amount) are filtered."""
    if not row["amount"]:
        return None
    if row["currency"] not in RATES:
        raise Reject(f"no rate for currency {row['currency']!r}")
    euros = Decimal(row["amount"]) * RATES[row["currency"]]
    return Order(day=date.fromisoformat(row["day"]).isoformat(), euros=f"{euros:.2f}")


if __name__ == "__main__":
    pipeline.run(file="orders.csv")
