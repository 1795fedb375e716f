"""
Several consumers on pipes: jobq run pipe_consumers.py [-b BACKEND] [-w CONSUMERS]

The textbook lets all consumers read one pipe, so it needs a Lock (without it they tear the bytes apart; a
consumer killed inside it stops the others), and it reads until `if item:` is false: item 0 ends it, and ""
and [] never arrive either. Here each consumer has a pipe of its own, and the end is no item: whatever was
yielded arrives.
"""

from collections.abc import Iterator
from typing import Any

from jobq import Pipeline

pipeline = Pipeline("pipe_consumers", backend="pipe")


@pipeline.producer
def send() -> Iterator[Any]:
    yield from range(10)
    yield from (0.0, "", b"", False, [], {})


@pipeline.consumer(workers=3)
def receive(item: Any) -> None:
    print(f"received {item!r}", flush=True)


if __name__ == "__main__":
    report = pipeline.run()
    print(f"{report.stages['receive'].done} of {report.stages['send'].emitted} arrived")
