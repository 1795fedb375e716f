"""
Two cooks, two eaters, ended by sentinels: python sentinel_buns.py [BACKEND]

The textbook puts one "done" for each consumer, counted by hand: change one number and some consumer waits
for ever. A cook that puts "done" while the other still cooks ends the meal early, since its sentinel
overtakes buns; and an eater that dies leaves one "done" too many, and its bun uneaten. Backend `sentinel`
also ends each worker by a sentinel, but sends it when every producer has ended and nothing is queued or in
hand.
"""

import sys
from collections.abc import Iterator

from jobq import Pipeline

pipeline = Pipeline("sentinel_buns")


def cook(filling: str) -> Iterator[str]:
    for number in range(10):
        yield f"{filling} bun {number}"


pipeline.producer(cook, name="sam", params={"filling": "leek"})
pipeline.producer(cook, name="kim", params={"filling": "bean"})


@pipeline.consumer(workers=2)
def eat(bun: str) -> str:
    return f"ate {bun}"


def main(backend: str = "sentinel") -> None:
    report = pipeline.run(backend=backend, collect=True)
    print(*report.results, sep="\n")
    print(f"{report.stages['eat'].done} buns eaten")


if __name__ == "__main__":
    main(*sys.argv[1:])
