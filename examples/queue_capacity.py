"""
A queue that holds ten: python queue_capacity.py [BACKEND]

The textbook asks `multiprocessing.Queue(10)` how full it is. `empty()` says True right after a `put()`,
since a thread still carries the item to the pipe; `qsize()` and `full()` are out of date when they return,
and `qsize()` only raises on macOS. Here one look shows every item: waiting, in hand or done.
"""

import sys
import time
from threading import Thread

from jobq import Pipeline

pipeline = Pipeline("queue_capacity")


@pipeline.consumer(queue_size=10)
def eat(bun: int) -> str:
    time.sleep(0.01)
    return f"bun {bun} eaten"


def main(backend: str = "joinable") -> None:
    with pipeline.open(backend=backend) as run:
        print(run.submit(0).result())

        def cook() -> None:
            for bun in range(1, 51):
                run.submit(bun)  # waits while ten wait

        producer = Thread(target=cook)
        producer.start()
        most = 0
        while producer.is_alive():
            now = run.stats()["eat"]
            assert now.received == now.done + now.queued + now.in_flight, now
            most = max(most, now.queued + now.in_flight)
        print("never more than 11 buns: ten that wait, one in hand" if most <= 11 else f"{most} buns at once")
        run.join()
        end = run.stats()["eat"]
        print(f"{end.received} cooked, {end.done} eaten, {end.queued} waiting")


if __name__ == "__main__":
    main(*sys.argv[1:])
