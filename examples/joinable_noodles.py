"""
Two cooks, two daemons that eat, ended by join(): python joinable_noodles.py [BACKEND]

In the textbook a cook ends by `queue.join()`, main by joining the cooks, and the daemons are killed with
main. One eater that dies or raises before its `task_done()`, and `join()` never returns. One `join()`
before the other cook's first `put()`, and it returns too early. And the daemons are killed where they
stand: what they had open is not closed. Here the log tells the order: cooks end, all is eaten, eaters clear
their places and end, main goes on.
"""

import sys
from collections.abc import Iterator

from jobq import Job, Pipeline

pipeline = Pipeline("joinable_noodles")


def cook(dish: str) -> Iterator[str]:
    for number in range(10):
        yield f"{dish} {number}"


pipeline.producer(cook, name="sam", params={"dish": "noodles"})
pipeline.producer(cook, name="kim", params={"dish": "soup"})


@pipeline.consumer(workers=2)
def eat(dish: str, place: str, job: Job) -> None:
    job.log.info("ate %s with %s", dish, place)


@pipeline.resource
def place() -> Iterator[str]:
    yield "chopsticks"
    print("place cleared", file=sys.stderr, flush=True)


def main(backend: str = "joinable") -> None:
    report = pipeline.run(backend=backend, log_level="debug", log_format="console")
    print(f"main: {report.stages['eat'].done} dishes eaten")


if __name__ == "__main__":
    main(*sys.argv[1:])
