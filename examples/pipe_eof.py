"""
Three words through a pipe until EOF: jobq run pipe_eof.py [-b BACKEND]

The textbook loops `recv()` until `EOFError`, which only comes if every process closed its copy of the end
that it doesn't use: forget one `close()`, or fork a sibling meanwhile, and the reader waits for ever. A
writer that is killed in the middle of a word leaves half of it. Here backend `pipe` closes the ends, and
takes no half of anything.
"""

from collections.abc import Iterator

from jobq import Pipeline

pipeline = Pipeline("pipe_eof", backend="pipe")


@pipeline.producer
def send() -> Iterator[str]:
    yield "hello"
    yield "hi"
    yield "你好"


@pipeline.consumer
def receive(word: str, heard: list[str]) -> None:
    heard.append(word)
    print(f"received {word}", flush=True)


@pipeline.resource
def heard() -> Iterator[list[str]]:
    words: list[str] = []
    yield words
    print(f"EOF after {len(words)} words", flush=True)


if __name__ == "__main__":
    pipeline.run()
