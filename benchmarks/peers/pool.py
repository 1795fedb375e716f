"""`multiprocessing.Pool`: ``imap_unordered`` best chunk size, or (``pool-chunked``) plain ``map``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pool
from types import MappingProxyType
from typing import Any

from benchmarks.contestant import Cannot, Contestant, Load, Work


class PoolOfTwo(Contestant):
    """A pool for each call. All outputs come back, wanted or not; they are counted."""

    chunks = MappingProxyType({"W1": 8192, "W2": 1024, "W6": 8192, "W8": 8192})

    def run(self, load: Load) -> list[Any] | int:
        """Map, unordered."""
        with Pool(2) as pool:
            outputs = pool.imap_unordered(load.work, load.items(load.count), self.chunk(load))
            return list(outputs) if load.results else sum(1 for _ in outputs)

    @contextmanager
    def caller(self, work: Work) -> Iterator[Work]:
        """Apply."""
        with Pool(2) as pool:
            yield lambda item: pool.apply(work, (item,))
            pool.close()
            pool.join()

    def stages(self, load: Load, stages: int) -> int:
        """Chain so many pools of one process, each fed by the one before."""
        pools = [Pool(1) for _ in range(stages)]
        outputs = load.items(load.count)
        for pool in pools:
            outputs = pool.imap_unordered(load.work, outputs, self.chunk(load))
        done = sum(1 for _ in outputs)
        for pool in pools:
            pool.terminate()
            pool.join()
        return done


class Chunked(Contestant):
    """``Pool.map`` with the chunks that it makes itself: a quarter of each worker's share."""

    def run(self, load: Load) -> list[Any] | int:
        """Map all at once."""
        if load.workload == "W8":
            raise Cannot("makes a list of all items first")
        with Pool(2) as pool:
            outputs = pool.map(load.work, load.items(load.count))
            return outputs if load.results else len(outputs)


def make(option: str) -> Contestant:
    """Return the pool, or the one with its own chunks."""
    return Chunked() if option == "chunked" else PoolOfTwo()
