"""
Crawl a site, each page once: jobq run crawler_loop.py -p root=URL, or python crawler_loop.py [BACKEND]

Links found are pages to fetch, so the graph has a loop. By hand, nobody knows when it is over (an empty
queue may fill again), the set of visited URLs needs a lock, and a bounded queue that its own readers fill
stops for ever. Here `key` keeps each URL to one visit, what flows back may exceed the queue, and the run
ends when nothing is left.
"""

import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urldefrag, urljoin
from urllib.request import urlopen

from jobq import Pipeline

Page = tuple[str, int]  # its URL and size
pipeline = Pipeline("crawler_loop")
SITE = {"/": ["/a", "/b"], "/a": ["/b", "/c", "/#top"], "/b": ["/", "/a"], "/c": ["/c", "/d"], "/d": []}


@pipeline.producer
def start(root: str = "http://localhost:8000/") -> Iterator[str]:
    yield root


@pipeline.consumer(source=["start", "fetch"], workers=4, key=str, max_retries=2)
def fetch(url: str, root: str = "http://localhost:8000/") -> Iterator[str | Page]:
    """Give the page, a result, and the site's URLs that it links to, which are to be fetched."""
    with urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    yield url, len(text)
    links = {urldefrag(urljoin(url, link)).url for link in re.findall(r'href="([^"]+)"', text)}
    yield from (link for link in links if link.startswith(root))


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write("".join(f'<a href="{link}">' for link in SITE[self.path]).encode())

    def log_message(self, *_: object) -> None: ...


def main(backend: str = "joinable") -> None:
    with ThreadingHTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever).start()
        report = pipeline.run(backend=backend, root=f"http://localhost:{server.server_port}/", collect=True)
        server.shutdown()
    for url, size in report.results:
        print(f"{url} has {size} characters")
    print(report.stages["fetch"].duplicates, "links led to known pages")


if __name__ == "__main__":
    main(*sys.argv[1:])
