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

pipeline = Pipeline("crawler_loop")
SITE = {"/": ["/a", "/b"], "/a": ["/b", "/c", "/#top"], "/b": ["/", "/a"], "/c": ["/c", "/d"], "/d": []}


@pipeline.producer
def start(root: str = "http://localhost:8000/") -> Iterator[str]:
    yield root


@pipeline.consumer(source=["start", "fetch"], workers=4, key=str, max_retries=2)
def fetch(url: str, root: str = "http://localhost:8000/") -> Iterator[str]:
    """Print the page's size; give the site's pages that it links to."""
    with urlopen(url, timeout=10) as answer:
        page = answer.read().decode()
    print(f"{url.removeprefix(root) or '.'}: {len(page)} characters", flush=True)
    links = {urldefrag(urljoin(url, link)).url for link in re.findall(r'href="([^"]+)"', page)}
    yield from sorted(link for link in links if link.startswith(root))


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write("".join(f'<a href="{link}">' for link in SITE[self.path]).encode())

    def log_message(self, *_: object) -> None:
        """Keep still."""


def main(backend: str = "joinable") -> None:
    with ThreadingHTTPServer(("localhost", 0), Page) as server:
        threading.Thread(target=server.serve_forever).start()
        report = pipeline.run(backend=backend, root=f"http://localhost:{server.server_port}/")
        server.shutdown()
    print(f"{report.stages['fetch'].done} pages, {report.stages['fetch'].duplicates} links to pages known")


if __name__ == "__main__":
    main(*sys.argv[1:])
