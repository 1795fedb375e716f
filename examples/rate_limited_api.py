"""
Call an API that refuses more than so many calls a second: python examples/rate_limited_api.py [BACKEND]

The textbook puts `time.sleep(1 / rate)` into each worker: four workers then call four times as often as
they may, and one slow answer makes all wait. Here `rate` counts the calls of all workers of the stage,
retries too, and spaces them evenly; waiting costs nothing, since `concurrency` lets others go on.
"""

import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.error import HTTPError
from urllib.request import urlopen

from jobq import Pipeline, Retry

pipeline = Pipeline("rate_limited_api")
RATE = 20.0


class Api(BaseHTTPRequestHandler):
    """Refuses a call that comes sooner after the last than half the space between two."""

    last = 0.0

    def do_GET(self) -> None:
        now = time.monotonic()
        soon, Api.last = now - Api.last < 0.5 / RATE, now
        self.send_response(429 if soon else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pipeline.producer
def cities(url: str, count: int = 30) -> Iterator[str]:
    yield from (f"{url}/{number}" for number in range(count))


@pipeline.consumer(workers=2, concurrency=4, rate=RATE, max_retries=5)
def weather(url: str) -> int:
    try:
        with urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except HTTPError as refused:
        raise Retry(delay=1.0) from refused


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        backend = sys.argv[1] if len(sys.argv) > 1 else "joinable"
        report = pipeline.run(url=address, collect=True, backend=backend, start_method="fork")
        server.shutdown()
    print(f"{report.results.count(200)} answers, {report.stages['weather'].retried} refused")
    print("not faster than allowed" if len(report.results) <= RATE * report.seconds + 1 else "too fast")
