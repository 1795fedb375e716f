"""
At most three at once: jobq run semaphore.py [-b BACKEND] [-p kill=true]

With the textbook's `multiprocessing.Semaphore(3)` each process that is killed inside takes its place with
it: after the third, all others wait for ever. Here a place is given back when its holder dies; kill=true
kills three inside.
"""

import os
import signal
import time
from collections.abc import Iterator

from jobq import Job, Lock, Pipeline, Semaphore

pipeline = Pipeline("semaphore")
three = Semaphore("section", 3)
lock = Lock("board")


@pipeline.producer
def guests() -> Iterator[int]:
    yield from range(24)


@pipeline.consumer(workers=6)
def visit(guest: int, board: dict[str, int], job: Job, kill: bool = False) -> None:
    with three:
        if kill and guest < 3 and job.delivery == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with lock:
            board["inside"] += 1
            board["most"] = max(board["most"], board["inside"])
        time.sleep(0.03)
        with lock:
            board["inside"] -= 1


@pipeline.resource(scope="run")
def board() -> Iterator[dict[str, int]]:
    counts = {"inside": 0, "most": 0}
    yield counts
    print(f"at most {counts['most']} were inside, {counts['inside']} are", flush=True)


if __name__ == "__main__":
    pipeline.run()
