"""
Parent and child answer each other: python two_way.py [BACKEND]

The textbook sends both ways over one queue: `put(222)`, start the child, `join()` it, `get()` its answer.
Without the `join` a quick parent reads its own 222 and the child waits for ever; with it, an answer larger
than the pipe's 64 KiB stops both; and if the child dies, `get()` never returns. Here each question has a
future of its own.
"""

import sys

from jobq import Pipeline

pipeline = Pipeline("two_way")


@pipeline.consumer
def child(number: int) -> str:
    print(f"child got {number}", flush=True)
    return f"hello from the child, twice {number} is {number * 2}"


def main(backend: str = "joinable") -> None:
    with pipeline.open(backend=backend) as run:
        answer = run.submit(222).result()
        print(f"parent got {answer!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
