"""
A hundred jobs each take one of a hundred: jobq run shared_count.py [-b BACKEND] [-p kill=true]

The textbook shares a `Manager().dict()` under a `Manager().Lock()` or a `multiprocessing.Lock`. Without the
lock two processes read the same count; with it, one that is killed inside leaves the lock locked, and all
others wait for ever. Here a lock is given back when its holder dies, and the job runs again on another
worker: kill=true kills the worker of one job while it holds the lock. (Kill it after its subtraction, and
it is done twice.)
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
    with lock:
        if kill and customer == 50 and job.delivery == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        stock["count"] -= 1


@pipeline.resource(scope="run")
def stock() -> Iterator[dict[str, int]]:
    counts = {"count": 100}
    yield counts
    print(f"{counts['count']} left", flush=True)


if __name__ == "__main__":
    pipeline.run()
