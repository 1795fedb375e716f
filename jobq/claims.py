"""
Jobs that take less than a microsecond, claimed by the hundred, so that one C loop can do them.

The page then shows where the claim begins and ends, which says of a job in between only that it may have
begun. Should one of them take long after all, the flusher gives back what has not begun: so nothing waits
behind it for more than a few milliseconds.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

from jobq.backend import CLAIMED, IDLE, LANES, Page

#: Jobs in a claim: what the page costs is then a hundredth of the cheapest job.
CLAIM_JOBS = 512
#: Jobs that take longer, in seconds, are begun one by one: the page costs 50 ns a job.
QUICK_SECONDS = 1e-6


class Left(Protocol):
    """An iterator over a list, which knows how much of it is left."""

    def __next__(self) -> Any: ...

    def __iter__(self) -> Left: ...

    def __length_hint__(self) -> int: ...


class Claims:
    """The claim of a worker that does one job after the other."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._lock = threading.Lock()
        self._items: list[Any] | None = None
        self._left: Left = iter([])  # type: ignore[assignment]  # a list's iterator has a length hint
        self._first = 0
        self._seen: list[Any] | None = None

    def renew(self) -> None:
        """Be usable in a copy of the process, whose only thread is the one that forked, and begin no job."""
        self._lock = threading.Lock()
        if self._items is not None:
            del self._items[len(self._items) - self._left.__length_hint__() :]

    def begin(self, items: list[Any], first: int) -> Left:
        """Claim the jobs of *items*, tickets *first* and on; return what yields those that may begin."""
        with self._lock:
            self._items, self._first = items, first
            self._left = iter(items)  # type: ignore[assignment]
            self._page[CLAIMED] = first + len(items)  # first, so that no job begins outside a claim
            self._page[LANES] = first
        return self._left

    def end(self, last: int) -> None:
        """Have the page show a single job again, the *last* that was begun."""
        with self._lock:
            self._items = None
            self._page[LANES] = last
            self._page[CLAIMED] = IDLE

    def narrow(self) -> None:
        """
        Give back what has not begun of a claim that the last call has seen already.

        For the flusher: the working thread is then in one of the jobs, or waits for our lock.
        """
        with self._lock:
            items, self._seen = self._seen, self._items
            if items is None or items is not self._items:
                return
            begun = len(items) - self._left.__length_hint__()
            if begun:
                del items[begun:]
                self._page[LANES] = self._first + begun - 1
                self._page[CLAIMED] = self._first + begun
