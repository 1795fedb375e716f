"""
Call a fixed set of workers and wait: python pool_apply.py [BACKEND]

In the textbook, `Pool.apply` waits for a worker that was killed for ever, and an `initializer` that raises
makes the pool start workers without end; nothing undoes it, since `terminate()` kills. Here a resource is
opened once in each worker and closed at its end, a lost worker's job goes to another, and leaving the
`with` is `close()` and `join()`.
"""

import os
import sys
from collections.abc import Iterator

from jobq import Pipeline

pipeline = Pipeline("pool_apply")


@pipeline.consumer(workers=3)
def square(number: int, opened: list[int]) -> tuple[int, int]:
    opened.append(number)
    return number * number, os.getpid()


@pipeline.resource
def opened() -> Iterator[list[int]]:
    """What the initializer was for; and what comes after the `yield` closes it."""
    numbers: list[int] = []
    yield numbers
    print(f"closed after {len(numbers)} jobs", flush=True)


def main(backend: str = "joinable") -> None:
    with pipeline.open(backend=backend) as run:
        answers = [run.submit(number).result() for number in range(10)]  # one after the other
        print("squares:", *[square for square, _ in answers])
        used = sorted({pid for _, pid in answers})
        print("pids:", *used, flush=True)  # before what workers print at their end
    print(f"{pipeline.name} is closed")


if __name__ == "__main__":
    main(*sys.argv[1:])
