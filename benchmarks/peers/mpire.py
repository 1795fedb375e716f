"""mpire's `WorkerPool`: ``imap_unordered``, best chunk size. It unpacks items, so each is put in a tuple."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

from mpire import WorkerPool

from benchmarks.contestant import AT_ONCE, Contestant, Load, Work


class Mpire(Contestant):
    """A pool for each call."""

    chunks = MappingProxyType({"W1": 8192, "W2": 1024, "W6": 8192, "W8": 8192})

    def run(self, load: Load) -> list[Any] | int:
        """Map, unordered."""
        with WorkerPool(n_jobs=2) as pool:
            outputs = self._map(pool, load, load.items(load.count))
            return list(outputs) if load.results else sum(1 for _ in outputs)

    def _map(self, pool: Any, load: Load, items: Iterator[Any]) -> Iterator[Any]:
        arguments = ((item,) for item in items)
        chunk = self.chunk(load)
        outputs: Iterator[Any] = pool.imap_unordered(
            load.work, arguments, iterable_len=load.count, chunk_size=chunk
        )
        return outputs

    @contextmanager
    def caller(self, work: Work) -> Iterator[Work]:
        """Apply."""
        with WorkerPool(n_jobs=2) as pool:
            yield lambda item: pool.apply(work, (item,))
            pool.stop_and_join()

    def stages(self, load: Load, stages: int) -> int:
        """Chain so many pools of one process, each fed by the one before."""
        with ExitStack() as stack:
            outputs = load.items(load.count)
            for _ in range(stages):
                outputs = self._map(stack.enter_context(WorkerPool(n_jobs=1)), load, outputs)
            return sum(1 for _ in outputs)

    def waiting(self, load: Load) -> list[Any]:
        """Take its threads, in this process."""
        if inspect.iscoroutinefunction(load.work):
            return super().waiting(load)
        with WorkerPool(n_jobs=AT_ONCE, start_method="threading") as pool:
            return list(self._map(pool, load, load.items(load.count)))


def make(_: str) -> Contestant:
    """Return mpire."""
    return Mpire()
