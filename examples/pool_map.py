"""
A function over many items: python pool_map.py [BACKEND]

In the textbook `Pool.map` waits for ever when a worker is killed, returns nothing if one item of a thousand
fails, and reads its input to the end first; `imap` does too, in a thread and without bound, so an endless
input fills the memory. `jobq.map` reads a bounded number ahead, gives results as they are asked for, in
order, and leaving the loop stops it. `run.map` of a session does the same with workers that stay.
"""

import os
import sys
from itertools import count, islice

import jobq


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def main(backend: str = "joinable") -> None:
    results = list(islice(jobq.map(square, count(), workers=3, backend=backend), 10))  # of an endless input
    print("map:", *[square for square, _ in results])
    print("pids:", *sorted({pid for _, pid in results}))

    some = jobq.map(square, range(10), workers=3, ordered=False, backend=backend)  # as imap_unordered
    print("sum:", sum(square for square, _ in some))

    pipeline = jobq.Pipeline("pool_map")
    pipeline.consumer(square, workers=3)
    with pipeline.open(backend=backend) as run:
        for numbers in range(5), range(5, 10):
            print("run.map:", *[square for square, _ in run.map(numbers)])


if __name__ == "__main__":
    main(*sys.argv[1:])
