"""
How far from ideal is a load in which 1 job in 100 takes 1,000 times as long as the others?

    python benchmarks/bimodal.py [--quick]

Jobs sleep (0.1 ms, or 100 ms) on two workers, so what is seen is scheduling, not CPU speed. The ideal is
greedy: each job, in its order, begins when the first worker is free, and nothing else takes time.
*makespan* is the whole call, with starting and ending the workers; *x ideal* compares it with the ideal
for the times asked for. *schedule* is from the first job's beginning to the last one's end, compared with the
ideal for the times that the jobs in fact slept, since a sleep of 0.1 ms takes longer: what is above 1 there
is workers that had nothing to do. Each measurement has a fresh process; methods take turns in a round.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from heapq import heapreplace
from multiprocessing import Pool
from statistics import median
from typing import Any

from fresh import in_fresh_process, machine

from jobq import Pipeline

FAST, SLOW, WORKERS = 0.0001, 0.1, 2
ORDERS = ("random", "slow-last")
METHODS = ("joinable", "sentinel", "pipe", "thread", "Pool.imap_unordered", "Pool.map")
pipeline = Pipeline("bimodal")


@pipeline.producer
def naps(jobs: int, order: str) -> Iterator[tuple[int, float]]:
    """Give each job's number and its seconds; the same ones each time."""
    seconds = [FAST] * (jobs - jobs // 100) + [SLOW] * (jobs // 100)
    if order == "random":
        random.Random(1).shuffle(seconds)
    yield from enumerate(seconds)


@pipeline.consumer(workers=WORKERS)
def nap(item: tuple[int, float]) -> tuple[int, float, float]:
    """Sleep, and tell the job's number, and when it began and ended."""
    began = time.monotonic()
    time.sleep(item[1])
    return item[0], began, time.monotonic()


def ideal(seconds: Sequence[float]) -> float:
    """Return the makespan of greedy list scheduling: each job in turn goes to the first free worker."""
    free_at = [0.0] * WORKERS
    for duration in seconds:
        heapreplace(free_at, free_at[0] + duration)
    return max(free_at)


def measure(method: str, jobs: int, order: str) -> dict[str, Any]:
    """Return the makespan of one run by *method*, and how it and its schedule compare with the ideal."""
    items = list(naps(jobs, order))
    started = time.monotonic()
    if method.startswith("Pool"):
        with Pool(WORKERS) as pool:
            way = pool.map if method == "Pool.map" else pool.imap_unordered
            done = list(way(nap, items))
    else:
        done = pipeline.run(jobs=jobs, order=order, backend=method, collect=True).results
    makespan = time.monotonic() - started
    assert len(done) == jobs
    schedule = max(ended for _, _, ended in done) - min(began for _, began, _ in done)
    return {
        "makespan": makespan,
        "x ideal": makespan / ideal([seconds for _, seconds in items]),
        "schedule": schedule / ideal([ended - began for _, began, ended in sorted(done)]),
    }


def main() -> None:
    """Measure, a fresh process each, and print a table for each order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=3_000)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--quick", action="store_true", help="one small round: shows that it works, no more")
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "ORDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        method, order = options.measure
        print(json.dumps(measure(method, options.jobs, order)))
        return
    if options.quick:
        options.rounds, options.jobs = 1, 500
    print(f"{machine()}; {options.jobs:,} jobs, {WORKERS} workers, {options.rounds} rounds, medians")
    for order in ORDERS:
        rounds = [
            {
                method: in_fresh_process(__file__, "--jobs", options.jobs, "--measure", method, order)
                for method in options.methods
            }
            for _ in range(options.rounds)
        ]
        asked = ideal([seconds for _, seconds in naps(options.jobs, order)])
        print(f"\n{order}: ideal {asked:.3f} s\n{'':22}{'makespan':>10}{'x ideal':>10}{'schedule':>10}")
        for method in options.methods:
            makespan, whole, schedule = (
                median(results[method][what] for results in rounds)
                for what in ("makespan", "x ideal", "schedule")
            )
            print(f"{method:22}{makespan:>8.3f} s{whole:>10.3f}{schedule:>10.3f}")


if __name__ == "__main__":
    main()
