"""
A hundred jobs each take one of a hundred: jobq run shared_count.py [-b BACKEND] [-p kill=true]

The textbook shares a `Manager().dict()` under a Lock. Kill a process inside, and the lock stays locked: all
others wait for ever. Here a dead holder's lock is given back, and its job runs again on another worker; so
may one that was done, but whose end nobody had heard of. Hence the mark beside the count, set in the same
step: the count is exact wherever a worker dies. kill=true kills one before that step and one behind it.
"""

import os
import signal
from collections.abc import Iterator

from jobq import Job, Lock, Pipeline

pipeline = Pipeline("shared_count")
lock = Lock("count")


@pipeline.producer
def customers() -> Iterator[int]:
    yield from range(100)


@pipeline.consumer(workers=4)
def take_one(customer: int, stock: dict[str, int], job: Job, kill: bool = False) -> None:
    dies = kill and job.delivery == 1
    with lock:
        if dies and customer == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        if job.id not in stock:
            stock.update({"count": stock["count"] - 1, job.id: customer})
        if dies and customer == 70:
            os.kill(os.getpid(), signal.SIGKILL)


@pipeline.resource(scope="run")
def stock() -> Iterator[dict[str, int]]:
    counts = {"count": 100}
    yield counts
    print(f"{counts['count']} left", flush=True)


if __name__ == "__main__":
    pipeline.run()
