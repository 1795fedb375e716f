"""
Send each item where its type belongs: jobq run branch_by_type.py [-b BACKEND]

With queues of your own this is one queue for each type, `isinstance` in the sender, and an end of work to
be told along each branch. Here the annotation `Invoice | Receipt` is the branch; what is neither fails as a
dead letter.
"""

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
def pay(invoice: Invoice) -> None:
    print(f"pay {invoice.cents}", flush=True)


@pipeline.consumer
def file_away(receipt: Receipt) -> None:
    print(f"file {receipt.cents}", flush=True)


if __name__ == "__main__":
    pipeline.run()
