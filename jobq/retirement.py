"""
When a worker is to be replaced for the sake of memory, seen from inside the worker.

It then begins no more jobs, and says so in its answers (`Answer.leaving`); the driver lets it end.
"""

from __future__ import annotations

import os
from pathlib import Path

#: After jobs that take less than so many nanoseconds there is a look only so often: one takes some 10 us.
LOOK_NS = 1_000_000


class Retirement:
    """Why this worker begins no more jobs (``why``, empty as long as it does)."""

    def __init__(self, max_memory: int | None = None) -> None:
        self.why = ""
        #: Whether `look` has anything to look for.
        self.watches = max_memory is not None
        self._max_memory = max_memory or 0
        self._looked = 0

    def note(self, error: BaseException | None) -> None:
        """Retire if a job failed since there was no memory: who knows what that left half done."""
        if isinstance(error, MemoryError):
            self.why = "a job failed with MemoryError"

    def look(self, now: int, began: int) -> bool:
        """Retire if the process has more memory than it may, after a job (or several) that *began* then."""
        recent = now - self._looked < LOOK_NS and began >= self._looked
        if self.watches and not self.why and not recent:
            self._looked = now
            used = resident()
            if used > self._max_memory:
                self.why = f"it has {used:,} bytes of memory, more than max_memory={self._max_memory:,}"
        return bool(self.why)


def resident() -> int:
    """Return how many bytes of memory this process has now (its resident set)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
