"""
Several consumers on pipes: python pipe_consumers.py [BACKEND]

The textbook lets all consumers read one pipe, so it needs a Lock (without it they tear the bytes apart; a
consumer killed inside it stops the others), and it reads until `if item:` is false: item 0 ends it, and ""
and [] never arrive either. Here each consumer has a pipe of its own, and the end is no item: whatever was
yielded arrives.
"""

import sys
from collections.abc import Iterator
from typing import Any

from jobq import Pipeline

pipeline = Pipeline("pipe_consumers")


@pipeline.producer
def send() -> Iterator[Any]:
    yield from range(10)
    yield from (0.0, "", b"", False, [], {})


@pipeline.consumer(workers=3)
def receive(item: Any) -> str:
    return f"received {item!r}"


def main(backend: str = "pipe") -> None:
    report = pipeline.run(backend=backend, collect=True)
    print(*report.results, sep="\n")
    print(f"{report.stages['receive'].done} of {report.stages['send'].emitted} arrived")


if __name__ == "__main__":
    main(*sys.argv[1:])
