"""pypeln: stages of processes, item by item; it has no chunks."""

from __future__ import annotations

import inspect
from typing import Any

import pypeln

from benchmarks.contestant import AT_ONCE, Contestant, Load


class Pypeln(Contestant):
    """A stage of two processes, or several of one; for what waits its tasks or threads, in this process."""

    def run(self, load: Load) -> list[Any] | int:
        """Map."""
        outputs = pypeln.process.map(load.work, load.items(load.count), workers=2)
        return list(outputs) if load.results else sum(1 for _ in outputs)

    def stages(self, load: Load, stages: int) -> int:
        """Map what was mapped."""
        outputs: Any = load.items(load.count)
        for _ in range(stages):
            outputs = pypeln.process.map(load.work, outputs, workers=1)
        return sum(1 for _ in outputs)

    def waiting(self, load: Load) -> list[Any]:
        """Map in so many tasks or threads."""
        kind = pypeln.task if inspect.iscoroutinefunction(load.work) else pypeln.thread
        return list(kind.map(load.work, load.items(load.count), workers=AT_ONCE))


def make(_: str) -> Contestant:
    """Return pypeln."""
    return Pypeln()
