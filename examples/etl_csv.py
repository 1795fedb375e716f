"""
Rows of a CSV file made clean, as a shell pipe: jobq run examples/etl_csv.py -p file=orders.csv -o - | sort

Or JSON lines to JSON lines: zcat orders.jsonl.gz | jobq run examples/etl_csv.py --input - -o - | head. The textbook
lets workers print (halves of lines mix), or stops at the first bad row, or drops it in an `except: pass`. Here
one process writes, in the order of the input; a bad row is a dead letter that names its line and field, and exit code 1
says so; `| head` ends it.
"""

import csv
import sys
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
def rows(file: Path | None = None) -> Iterator[Row]:
    """Give the rows of *file*, or of standard input."""
    with file.open(newline="") if file else sys.stdin as lines:
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
    pipeline.run()
