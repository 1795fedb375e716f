"""
Many URLs at once, a callback as each arrives, in three ways side by side: python examples/fetch_urls.py

The textbook passes `callback=` to `pool.apply_async`: it isn't called for a URL that fails, what it raises
ends the pool's result thread so that every later `get()` hangs, and so does that of a worker that died. Here
a callback gets the future, failed or not, and all of them have run when the `with` ends.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

from jobq import Pipeline

DELAYS = [0.5] + [0.1] * 19  # seconds until the server answers /0.5, then 19 times /0.1


class Slow(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        time.sleep(float(self.path[1:]))
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + self.path.encode())


def fetch(url: str) -> str:
    with urlopen(url, timeout=10) as response:
        return str(response.read().decode())


async def fetch_async(url: str) -> str:
    host, _, path = url.removeprefix("http://").partition("/")
    reader, writer = await asyncio.open_connection(*host.split(":"))
    writer.write(f"GET /{path} HTTP/1.0\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer.decode().rpartition("\r\n")[2]


def time_it(way: str, function: Callable[[str], object], urls: list[str], **options: int) -> None:
    """Print how long *function* took for all of *urls*, and which arrived last."""
    arrived: list[object] = []
    (pipeline := Pipeline(function.__name__)).consumer(function, **options)
    began = time.monotonic()
    with pipeline.open() as run:
        for url in urls:
            run.submit(url).add_done_callback(lambda future: arrived.append(future.result()))
    print(f"{way:<22} {time.monotonic() - began:.2f} s, {len(arrived)} arrived, last {arrived[-1]}")


if __name__ == "__main__":
    ThreadingHTTPServer.request_queue_size = 50  # with the default 5, a burst of clients waits a second
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/{delay}" for delay in DELAYS]
        time_it("4 processes", fetch, urls, workers=4)
        time_it("1 process, 20 threads", fetch, urls, concurrency=20)
        time_it("1 process, 20 tasks", fetch_async, urls, concurrency=20)
        server.shutdown()
