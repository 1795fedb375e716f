"""jobq as its README shows it: no option is set but the number of workers and the backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from benchmarks.contestant import AT_ONCE, Cannot, Contestant, Load, Work
from jobq import Pipeline


class Jobq(Contestant):
    """A pipeline of one producer and the consumers."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def run(self, load: Load) -> list[Any] | int:
        """Run producer and consumer."""
        if self.backend == "inline" and load.workload.startswith(("W3", "W10")):
            raise Cannot("the question is two workers")
        return self._finish(self._pipeline(load), load)

    def _pipeline(self, load: Load, **options: Any) -> Pipeline:
        pipeline = Pipeline("benchmark")
        pipeline.producer(load.items, name="items")
        pipeline.consumer(load.work, name="work", **{"workers": 2, **options})
        return pipeline

    def _finish(self, pipeline: Pipeline, load: Load) -> list[Any] | int:
        report = pipeline.run(count=load.count, backend=self.backend, collect=load.results)
        return report.results if load.results else report.stages["work"].done

    @contextmanager
    def caller(self, work: Work) -> Iterator[Work]:
        """Submit to an open session."""
        pipeline = Pipeline("benchmark")
        pipeline.consumer(work, name="work", workers=2)
        with pipeline.open(backend=self.backend) as session:
            yield lambda item: session.submit(item).result()

    def stages(self, load: Load, stages: int) -> int:
        """Chain consumers, each fed by the one above it."""
        pipeline = Pipeline("benchmark")
        pipeline.producer(load.items, name="items")
        names = ["items", *(f"work{number}" for number in range(1, stages)), "work"]
        for source, name in pairwise(names):
            pipeline.consumer(load.work, name=name, source=source)
        return pipeline.run(count=load.count, backend=self.backend).stages["work"].done

    def waiting(self, load: Load) -> list[Any]:
        """One worker with that much concurrency."""
        if self.backend == "inline":
            raise Cannot("one job at a time")
        done = self._finish(self._pipeline(load, workers=1, concurrency=AT_ONCE), load)
        assert isinstance(done, list)
        return done


def make(backend: str) -> Contestant:
    """Return jobq on *backend*."""
    return Jobq(backend)
