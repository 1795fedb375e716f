"""
Ray: two actors, which get lists of the best length, a few of them ahead of each, as its anti-patterns advise.

The cluster is up before the clock; so are the actors, except where starting them is the question.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from types import MappingProxyType
from typing import Any

import ray

from benchmarks.contestant import AT_ONCE, Contestant, Load, Work

#: How many lists are on their way to each actor.
AHEAD = 4


class Actor:
    """Does the work; becomes a Ray actor below."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def one(self, item: Any) -> Any:
        """Return what the work gives for *item*."""
        return self.work(item)

    def many(self, items: list[Any]) -> list[Any]:
        """Return what the work gives for each."""
        return [self.work(item) for item in items]


class Waiting(Actor):
    """An actor of one event loop, because one of its methods is a coroutine."""

    async def wait(self, item: Any) -> Any:
        """Return what the asynchronous work gives for *item*."""
        return await self.work(item)


class Ray(Contestant):
    """Actors, fed by hand."""

    chunks = MappingProxyType({"W1": 16_384, "W2": 2048, "W6": 16_384, "W8": 16_384})

    def prepare(self, load: Load) -> None:
        """The cluster is up, and the actors are, unless starting them is the question."""
        ray.init(num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
        waits = inspect.iscoroutinefunction(load.work)
        if load.workload.startswith("W9"):
            self.actors = self._actors(load.work, 1, Waiting if waits else Actor, max_concurrency=AT_ONCE)
        elif not load.workload.startswith(("W5", "W7")):
            self.actors = self._actors(load.work, 3 if load.workload == "W6" else 2)

    def close(self) -> None:
        """The cluster is down."""
        ray.shutdown()

    def _actors(self, work: Work, count: int, kind: type[Actor] = Actor, **options: Any) -> list[Any]:
        actors = [ray.remote(kind).options(num_cpus=0, **options).remote(work) for _ in range(count)]
        ray.get([actor.__ray_ready__.remote() for actor in actors])
        return actors

    def run(self, load: Load) -> list[Any] | int:
        """Keep each actor fed; take the answers as they come."""
        results: list[Any] = []
        done = 0
        items = load.items(load.count)
        at: dict[Any, Any] = {}
        idle = [actor for _ in range(AHEAD) for actor in self.actors]
        while True:
            while idle and (chunk := list(islice(items, self.chunk(load)))):
                actor = idle.pop(0)
                if len(chunk) == 1:  # as a bare argument an array is shared, not copied
                    at[actor.one.remote(chunk[0])] = actor, 1
                else:
                    at[actor.many.remote(chunk)] = actor, len(chunk)
            if not at:
                return results if load.results else done
            [ready], _ = ray.wait(list(at), num_returns=1)
            actor, count = at.pop(ready)
            idle.append(actor)
            outputs = ray.get(ready)
            done += count
            if load.results:
                results.extend([outputs] if count == 1 else outputs)

    @contextmanager
    def caller(self, work: Work) -> Iterator[Work]:
        """Start two actors; call one."""
        actors = self._actors(work, 2)
        yield lambda item: ray.get(actors[0].one.remote(item))
        for actor in actors:
            ray.kill(actor)

    def stages(self, load: Load, stages: int) -> int:
        """Pass on references: an actor's answer goes to the next one without coming by here."""
        items = load.items(load.count)
        under_way: list[Any] = []
        done = 0
        while True:
            while len(under_way) < AHEAD * stages and (chunk := list(islice(items, self.chunk(load)))):
                passed: Any = chunk
                for actor in self.actors[:stages]:
                    passed = actor.many.remote(passed)
                under_way.append(passed)
            if not under_way:
                return done
            done += len(ray.get(under_way.pop(0)))

    def waiting(self, load: Load) -> list[Any]:
        """One actor with that much concurrency."""
        [actor] = self.actors
        call = actor.wait if inspect.iscoroutinefunction(load.work) else actor.one
        return list(ray.get([call.remote(item) for item in load.items(load.count)]))


def make(_: str) -> Contestant:
    """Return Ray."""
    return Ray()
