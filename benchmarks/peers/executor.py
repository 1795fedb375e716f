"""`concurrent.futures.ProcessPoolExecutor`: ``map`` with the best chunk size, ``submit`` for one item."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

from benchmarks.contestant import Contestant, Load, Work


class Executor(Contestant):
    """An executor for each call. It takes all items at once, and all outputs come back."""

    chunks = MappingProxyType({"W1": 8192, "W2": 1024, "W6": 8192, "W8": 8192})

    def run(self, load: Load) -> list[Any] | int:
        """Map."""
        with ProcessPoolExecutor(2) as executor:
            outputs = executor.map(load.work, load.items(load.count), chunksize=self.chunk(load))
            return list(outputs) if load.results else sum(1 for _ in outputs)

    @contextmanager
    def caller(self, work: Work) -> Iterator[Work]:
        """Submit."""
        with ProcessPoolExecutor(2) as executor:
            yield lambda item: executor.submit(work, item).result()

    def stages(self, load: Load, stages: int) -> int:
        """Chain so many executors of one process: each takes all that the one before gives first."""
        with ExitStack() as stack:
            outputs = load.items(load.count)
            for _ in range(stages):
                executor = stack.enter_context(ProcessPoolExecutor(1))
                outputs = executor.map(load.work, outputs, chunksize=self.chunk(load))
            return sum(1 for _ in outputs)


def make(_: str) -> Contestant:
    """Return the executor."""
    return Executor()
