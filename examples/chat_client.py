"""
Clients of chat_server.py, several at once: jobq run examples/chat_client.py -p port=5000 -p clients=6 -o -

The textbook opens six terminals, or starts six processes that print over each other's lines, and nobody knows
if one failed. Here each client is a job; they run at once, in threads of one worker; one process writes what
they heard, whole; a server that isn't there yet is tried again, and one that stays away makes dead letters.
"""

import socket
from collections.abc import Iterator
from dataclasses import dataclass

from jobq import Pipeline

WORDS = ["hello", "hi", "你好"]
pipeline = Pipeline("chat_client")


@dataclass(frozen=True)
class Talk:
    client: str
    words: list[str]


@dataclass(frozen=True)
class Heard:
    client: str
    worker: int
    answers: list[str]


@pipeline.producer
def clients(clients: int = 6) -> Iterator[Talk]:
    """Give so many talks."""
    for number in range(clients):
        yield Talk(f"client {number}", WORDS)


@pipeline.consumer(concurrency=8, max_retries=3, retry_on=ConnectionError)
def chat(talk: Talk, port: int) -> Heard:
    """Say each word, and wait for its answer before the next."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as server, server.makefile() as answers:
        heard = []
        for word in talk.words:
            server.sendall(f"{word}\n".encode())
            worker, _, answer = answers.readline().rstrip("\n").partition(" ")
            if not answer:
                raise ConnectionResetError("the server hung up")
            heard.append(answer)
    return Heard(talk.client, int(worker), heard)


if __name__ == "__main__":
    pipeline.run(port=5000)
