"""
A chat server on four workers: jobq run examples/chat_server.py -p port=5000 (and see chat_client.py)

The textbook gives what it accepts to `pool.apply_async` and looks at no result: nobody hears of what went
wrong in a conversation, and Ctrl-C prints a traceback per process and leaves its clients in mid-sentence.
Here a client that vanishes is counted as filtered, the fifth of five waits until a worker is free, and Ctrl-C
lets each worker finish its answer, close its client and end.
"""

import socket
import threading
from collections.abc import Iterator

from jobq import Job, Pipeline, Skip

LONGEST_LINE = 10_000
pipeline = Pipeline("chat_server")


@pipeline.producer
def accept(job: Job, port: int = 0, clients: int | None = None) -> Iterator[socket.socket]:
    """Give *clients* connections, or each that comes; port 0 lets the system choose."""
    with socket.create_server(("127.0.0.1", port)) as server:
        print("listening on port", server.getsockname()[1], flush=True)
        server.settimeout(0.2)  # so that a stop is noticed
        while not job.stopping and clients != 0:
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            yield client
            clients = None if clients is None else clients - 1


@pipeline.consumer(workers=4)
def talk(client: socket.socket, job: Job) -> None:
    """Answer each line in upper case, with the number of the worker, until the client leaves."""
    worker = threading.get_native_id()  # in a process of its own: the pid
    with client:
        client.settimeout(0.2)
        rest = b""
        while not job.stopping and len(rest) < LONGEST_LINE:
            try:
                said = client.recv(4096)
                *lines, rest = (rest + said).split(b"\n")
                for line in lines:
                    client.sendall(f"{worker} {line.decode().upper()}\n".encode())
            except TimeoutError:
                continue
            except ConnectionError as error:
                raise Skip(f"{error}: the client has vanished") from error
            if not said:
                return


if __name__ == "__main__":
    pipeline.run()
