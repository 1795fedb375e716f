"""
Bugs planted in the scheduler and the driver, each of which `jobq.testing.simulate` must find, each time.

    python -m tests.planted_bugs            # how many seeds each takes, over twenty different ranges of seeds
    python -m tests.planted_bugs --none 10000   # and that without one none fails: so many for each pipeline

A bug is a place in the source and what stands there instead. Should the place have changed, planting fails.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from jobq import Pipeline
from jobq.driver import Driver
from jobq.ordering import Sequencer
from jobq.pool import Member
from jobq.scheduler import Line, Scheduler
from jobq.testing import Faults, SimulationFailed, simulate
from tests.simulated import ALL

#: A bug that so many seeds of each pipeline don't show counts as missed.
ENOUGH = 300
ROUNDS = 20


@dataclass(frozen=True)
class Bug:
    """*wrong* instead of *right*, which occurs once, in the function *name* of *owner*."""

    what: str
    owner: Any
    name: str
    right: str
    wrong: str


BUGS = (
    Bug(
        "what a dead worker had not begun is forgotten",
        Scheduler,
        "lost",
        "self.put_back(line, flight.parts(clean), solo=flight.solo)",
        "pass",
    ),
    Bug(
        "what was taken back is forgotten",
        Scheduler,
        "take_back",
        "self._queue_again(line, worker, flight, closed)",
        "(self._landed(line, worker, flight, closed) if closed else None) or sum(b - a for a, b in closed)",
    ),
    Bug(
        "late answers count",
        Scheduler,
        "settle",
        "closed += flight.close(low, high)",
        "closed += flight.close(low, high) or [(low, high)]",
    ),
    Bug(
        "all jobs of a chunk are blamed for a death",
        Scheduler,
        "_suspects",
        "return [index for index in indices if index in held]",
        "return indices",
    ),
    Bug(
        "a job that kills its worker is never charged",
        Scheduler,
        "_charge",
        "replace(part, delivery=part.delivery + 1)",
        "part",
    ),
    Bug(
        "one retry too many",
        Scheduler,
        "_failed",
        "retry_delay(failure, part.attempt,",
        "retry_delay(failure, part.attempt - 1,",
    ),
    Bug(
        "ordered outputs wait for nobody",
        Sequencer,
        "release",
        "while self._settled and self._settled[0][0] <= self.head:",
        "while self._settled:",
    ),
    Bug(
        "room that was promised is never given back",
        Scheduler,
        "_landed",
        "self._promise(line, -count)",
        "pass",
    ),
    Bug(
        "jobs in flight take no room",
        Line,
        "room",
        "- self.queued - self.flying - self.promised",
        "- self.queued - self.promised",
    ),
    Bug(
        "the run ends while jobs are in flight",
        Scheduler,
        "finished",
        "line.producing or line.queued or line.flying",
        "line.producing or line.queued",
    ),
    Bug(
        "a key is forgotten",
        Scheduler,
        "accept",
        "line.seen.add(key)",
        "pass",
    ),
    Bug(
        "a worker may begin again while it still has what was taken back",
        Driver,
        "_settle",
        "if member.recalled <= 0 or not line.flights.get(member.worker.name):",
        "if True:",
    ),
    Bug(
        "whatever a worker refused counts as taken back",
        Scheduler,
        "settle",
        "return len(answer.skipped) - len(refused)",
        "return len(answer.skipped)",
    ),
    Bug(
        "a claim from behind the limit lifts it",
        Member,
        "stop_beginning",
        "if limit == NO_LIMIT else",
        "if True else",
    ),
)


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """Inside the ``with`` the scheduler has *bug*."""
    found = inspect.getattr_static(bug.owner, bug.name)
    function: Any = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(bug.right) != 1:
        raise LookupError(f"{bug.what}: {bug.right!r} is not once in {bug.owner.__name__}.{bug.name}")
    names: dict[str, Any] = {}
    exec(source.replace(bug.right, bug.wrong), function.__globals__ | {}, names)
    changed = names[bug.name]
    with mock.patch.object(bug.owner, bug.name, changed):
        yield


def hunt(seeds: Sequence[int], pipelines: Sequence[Pipeline] = ALL) -> SimulationFailed | None:
    """Return the first failure among the seeds, each for every pipeline; None if there is none."""
    for seed in seeds:
        for pipeline in pipelines:
            try:
                simulate(pipeline, seed=[seed])
            except SimulationFailed as failed:
                return failed
    return None


def find_all() -> int:
    """Print how many seeds each bug takes; return how many were missed."""
    missed = 0
    for bug in BUGS:
        taken = []
        with planted(bug):
            for start in range(0, ROUNDS * ENOUGH, ENOUGH):
                failed = hunt(range(start, start + ENOUGH))
                taken.append(failed.seed - start + 1 if failed is not None else 0)
        lost = taken.count(0)
        missed += lost
        print(f"{bug.what:65} found {ROUNDS - lost} of {ROUNDS} times, within {max(taken)} seeds", flush=True)
    return missed


def find_none(count: int) -> int:
    """Print that no seed fails where no bug is planted; return how many runs did."""
    failures = 0
    kinds: Sequence[tuple[str, Faults, dict[str, Any]]] = (
        ("", Faults(), {}),
        ("max_failures", Faults(), {"max_failures": 3}),
        ("signals", Faults(signals=0.7), {"shutdown_timeout": 0.05}),
        ("heavy", Faults(deaths=0.15, failures=0.15, delays=0.2), {}),
    )
    for pipeline in ALL:
        for number, (kind, faults, options) in enumerate(kinds):
            seeds = range(number * count, number * count + count // len(kinds))
            began = time.process_time()
            try:
                simulate(pipeline, seed=seeds, faults=faults, **options)
            except SimulationFailed as failed:
                failures += 1
                print(failed)
            took = time.process_time() - began
            print(
                f"{pipeline.name:10} {kind:13} {len(seeds)} seeds, {took / len(seeds) * 1000:.1f} ms each",
                flush=True,
            )
    return failures


if __name__ == "__main__":
    if sys.argv[1:2] == ["--none"]:
        sys.exit(bool(find_none(int(sys.argv[2]))))
    sys.exit(bool(find_all()))
