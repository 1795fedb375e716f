"""
A traffic light, and a patrol that ends when asked: python event.py [BACKEND]

In the textbook every process gets an Event and must remember to `wait()` on it; kill one that waits, and
`set()` never returns, since it waits for the dead process to wake. Here a run is paused and resumed from
outside, which the jobs needn't know of, and a long job sees `job.stopping`.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from jobq import Job, Pipeline

crossing = Pipeline("crossing")
police = Pipeline("police")


@crossing.consumer(workers=3)
def drive(car: str) -> str:
    return f"{car} drives"


@police.producer
def streets() -> Iterator[str]:
    yield "High Street"


@police.consumer
def patrol(street: str, main_pid: int, job: Job) -> None:
    os.kill(main_pid, signal.SIGINT)  # as if somebody pressed Ctrl-C now
    while not job.stopping:
        time.sleep(0.01)
    print(f"{street}: patrol ended in good order", flush=True)


def main(backend: str = "joinable") -> None:
    with crossing.open(backend=backend) as run:
        run.pause()
        cars = [run.submit(f"car {number}") for number in range(3)]
        time.sleep(0.2)
        print("red:", sum(car.done() for car in cars), "cars have passed")
        run.resume()
        print("green:", ", ".join(car.result() for car in cars))

    with suppress(KeyboardInterrupt):  # raised at the end if a producer was still at work
        police.run(backend=backend, main_pid=os.getpid())


if __name__ == "__main__":
    main(*sys.argv[1:])
