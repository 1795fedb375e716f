"""
The baseline: the textbook program on a `multiprocessing.JoinableQueue`, one item at a time.

    python benchmarks/raw_joinable.py [ITEMS]
"""

from __future__ import annotations

import sys
import time
from multiprocessing import JoinableQueue, Process


def take(number: int) -> None:
    """Do nothing: what is measured is the way here."""


def consume(queue: JoinableQueue[int]) -> None:
    """Take numbers, for ever: a daemon ends with the program."""
    while True:
        number = queue.get()
        take(number)
        queue.task_done()


def run(items: int, consumers: int = 2) -> float:
    """Return the seconds from before the first process is started until the last item is done."""
    began = time.perf_counter()
    queue: JoinableQueue[int] = JoinableQueue()
    processes = [Process(target=consume, args=(queue,), daemon=True) for _ in range(consumers)]
    for process in processes:
        process.start()
    for number in range(items):
        queue.put(number)
    queue.join()
    seconds = time.perf_counter() - began
    for process in processes:
        process.terminate()
        process.join()
    return seconds


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    took = run(count)
    print(f"{count:,} items in {took:.2f} s: {count / took:,.0f} items/s")
