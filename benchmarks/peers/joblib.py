"""
joblib with its default backend, loky.

Its workers outlive a call: they are started before the clock, except where start and stop are the question.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor

from benchmarks.contestant import AT_ONCE, Contestant, Load, Work


class Joblib(Contestant):
    """`Parallel`, unordered, with the best batch size."""

    chunks = MappingProxyType({"W1": 8192, "W2": 1024, "W8": 8192})

    def prepare(self, load: Load) -> None:
        """Two workers are up and have loaded the work."""
        if not load.workload.startswith(("W7", "W9")):
            Parallel(n_jobs=2)(delayed(load.work)(item) for item in load.items(2))

    def run(self, load: Load) -> list[Any] | int:
        """Call with all items."""
        parallel = Parallel(n_jobs=2, batch_size=self.chunk(load), return_as="generator_unordered")
        outputs = parallel(delayed(load.work)(item) for item in load.items(load.count))
        return list(outputs) if load.results else sum(1 for _ in outputs)

    @contextmanager
    def caller(self, work: Work) -> Iterator[Work]:
        """Call again and again with one item, the workers kept."""
        with Parallel(n_jobs=2) as parallel:
            yield lambda item: parallel([delayed(work)(item)])[0]
        get_reusable_executor().shutdown(wait=True)

    def waiting(self, load: Load) -> list[Any]:
        """Take its threading backend, in this process."""
        if inspect.iscoroutinefunction(load.work):
            return super().waiting(load)
        parallel = Parallel(n_jobs=AT_ONCE, backend="threading", batch_size=1)
        return list(parallel(delayed(load.work)(item) for item in load.items(load.count)))


def make(_: str) -> Contestant:
    """Return joblib."""
    return Joblib()
