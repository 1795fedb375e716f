"""Outputs leave in the order in which their jobs' numbers were given out."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class Sequencer(Generic[T]):
    """
    Holds what jobs gave until every job before them is settled.

    ``head`` is the number of the first job that is not settled.
    """

    def __init__(self) -> None:
        self.head = 0
        self._settled: list[tuple[int, int]] = []  # heap of (first, count)
        self._outputs: dict[int, list[T]] = {}

    def add(self, number: int, output: T) -> None:
        """Hold *output* of the job *number* (or of a run of jobs that begins with it)."""
        self._outputs.setdefault(number, []).append(output)

    def drop(self, number: int) -> list[T]:
        """Forget what the job *number* gave so far: it failed. Returns it."""
        return self._outputs.pop(number, [])

    def settle(self, first: int, count: int) -> None:
        """Take the jobs ``first … first + count - 1`` as settled: they hold nobody back any more."""
        heapq.heappush(self._settled, (first, count))

    def release(self) -> list[T]:
        """Return, in order, every output that need not be held any longer."""
        free: list[T] = []
        while self._settled and self._settled[0][0] <= self.head:
            first, count = heapq.heappop(self._settled)
            for number in range(first, first + count) if self._outputs else ():
                free += self._outputs.pop(number, ())
            self.head = max(self.head, first + count)
        # What the job at the head gives in parts can go at once.
        free += self._outputs.pop(self.head, ())
        return free
