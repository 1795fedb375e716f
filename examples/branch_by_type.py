"""
Send each item where its type belongs: python branch_by_type.py [BACKEND]

With queues of your own this is one queue for each type, `isinstance` in the sender, and an end of work to
be told along each branch. Here the annotation `Invoice | Receipt` is the branch; what is neither fails as a
dead letter.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from jobq import Pipeline

pipeline = Pipeline("branch_by_type")
LETTERS = ["invoice 100", "receipt 25", "invoice 250", "invoice 7", "receipt 60"]


@dataclass
class Invoice:
    cents: int


@dataclass
class Receipt:
    cents: int


@pipeline.producer
def letters() -> Iterator[str]:
    yield from LETTERS


@pipeline.consumer(workers=2)
def read(letter: str) -> Invoice | Receipt:
    kind, amount = letter.split()
    return Invoice(int(amount)) if kind == "invoice" else Receipt(int(amount))


@pipeline.consumer
def pay(invoice: Invoice) -> str:
    return f"paid {invoice.cents}"


@pipeline.consumer
def file_away(receipt: Receipt) -> str:
    return f"filed {receipt.cents}"


def main(backend: str = "joinable") -> None:
    for what_happened in pipeline.stream(backend=backend):
        print(what_happened)


if __name__ == "__main__":
    main(*sys.argv[1:])
