"""
Insert by the hundred: jobq run batch_insert.py [-b BACKEND] [-p rows=1050] [-p database=numbers.db]

By hand one collects rows in a list and inserts it when it is full: the last, unfilled list is forgotten, a
slow source leaves rows waiting, and several writers lock each other out of SQLite. Here the parameter is a
list: `batch` at most, after `batch_timeout` at the latest, and the rest at the end; one worker has the
connection.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing

from jobq import Pipeline

pipeline = Pipeline("batch_insert")


@pipeline.producer
def numbers(rows: int = 1050) -> Iterator[int]:
    yield from range(rows)


@pipeline.consumer(workers=2)
def square(number: int) -> tuple[int, int]:
    return number, number * number


@pipeline.consumer(batch=100, batch_timeout=30)
def insert(rows: list[tuple[int, int]], db: sqlite3.Connection) -> None:
    with db:  # one transaction a batch; a batch that runs again does no harm
        db.executemany("INSERT OR REPLACE INTO square VALUES (?, ?)", rows)
    print(f"inserted {len(rows)}", flush=True)


@pipeline.resource
def db(database: str = "numbers.db") -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS square (number PRIMARY KEY, square)")
        yield connection


if __name__ == "__main__":
    pipeline.run()
