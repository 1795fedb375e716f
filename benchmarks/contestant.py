"""What each contestant can be asked to do, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

Work = Callable[[Any], Any]

#: Every contestant by name: the module in `peers`, and after the dash what its `make` is given.
NAMES = (
    "jobq-joinable",
    "jobq-sentinel",
    "jobq-pipe",
    "jobq-thread",
    "jobq-inline",
    "raw-joinable",
    "raw-sentinel",
    "raw-pipe",
    "pool",
    "pool-chunked",
    "executor",
    "joblib",
    "mpire",
    "pypeln",
    "ray",
    "limit",
)

#: How many jobs wait at once in a worker that can do several.
AT_ONCE = 50


class Cannot(Exception):
    """The contestant has no means for this; the message says why."""


@dataclass(frozen=True)
class Load:
    """
    The items and what is to be done with each, by two workers unless said otherwise.

    ``items(count)`` yields all different items and is annotated, as is ``work``. ``results``: what ``work``
    returns is wanted back in the calling process. ``workload`` names it, and ``chunk`` is how many items
    should travel together where the caller has to say so (0: what was found to be best).
    """

    workload: str
    items: Callable[[int], Iterator[Any]]
    work: Work
    count: int
    results: bool
    chunk: int = 0


class Contestant:
    """One way of getting the work done. What it can't do is left as it is here."""

    #: The best number of items in a chunk for a workload, found by ``--chunk``; 1 for all others.
    chunks: Mapping[str, int] = MappingProxyType({})

    def prepare(self, load: Load) -> None:
        """Workers that outlive a call are running: their start is then in no time that is told."""

    def close(self) -> None:
        """What `prepare` started has ended."""

    def run(self, load: Load) -> list[Any] | int:
        """Start, do all of *load*, end; return the results, or if none are wanted how many jobs were done."""
        raise Cannot("not its kind of work")

    def caller(self, work: Work) -> AbstractContextManager[Work]:
        """Give a function that has one item worked on by one of two workers and returns the result."""
        raise Cannot("takes no single items")

    def stages(self, load: Load, stages: int) -> int:
        """Do *load* in so many stages of the same work, one worker each; return what the last has counted."""
        raise Cannot("has no stages")

    def waiting(self, load: Load) -> list[Any]:
        """Do *load*, work that waits, in one worker process, `AT_ONCE` at a time; return the results."""
        raise Cannot("a worker process does one job at a time")

    def chunk(self, load: Load) -> int:
        """Return how many items are to travel together."""
        return load.chunk or self.chunks.get(load.workload.partition("-")[0], 1)


def contestant(name: str) -> Contestant:
    """Return the contestant *name*; raises `ImportError` if it is not here."""
    family, _, option = name.partition("-")
    made: Contestant = import_module(f"benchmarks.peers.{family}").make(option)
    return made
