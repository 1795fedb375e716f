"""
How far from ideal is a load in which 1 job in 100 takes 1,000 times as long as the others?

    python benchmarks/bimodal.py [--quick]

Jobs sleep (0.1 ms, or 100 ms) on two workers, so what is seen is scheduling, not CPU speed. The ideal is
greedy: each job, in its order, begins when the first worker is free, and nothing else takes time. It is
computed twice: from the times asked for, and from the times that the jobs in fact slept, since a sleep of
0.1 ms takes longer. The makespan includes starting and ending the workers. Each measurement has a fresh
process; methods take turns within a round.
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
def nap(item: tuple[int, float]) -> tuple[int, float]:
    """Sleep, and tell the job's number and the seconds that it took."""
    began = time.perf_counter()
    time.sleep(item[1])
    return item[0], time.perf_counter() - began


def ideal(seconds: Sequence[float]) -> float:
    """Return the makespan of greedy list scheduling: each job in turn goes to the first free worker."""
    free_at = [0.0] * WORKERS
    for duration in seconds:
        heapreplace(free_at, free_at[0] + duration)
    return max(free_at)


def measure(method: str, jobs: int, order: str) -> dict[str, Any]:
    """Return the makespan of one run by *method*, as multiples of both ideals."""
    items = list(naps(jobs, order))
    began = time.perf_counter()
    if method.startswith("Pool"):
        with Pool(WORKERS) as pool:
            way = pool.map if method == "Pool.map" else pool.imap_unordered
            slept = list(way(nap, items))
    else:
        slept = pipeline.run(jobs=jobs, order=order, backend=method, collect=True).results
    makespan = time.perf_counter() - began
    assert len(slept) == jobs
    asked = ideal([seconds for _, seconds in items])
    return {
        "makespan": makespan,
        "asked": makespan / asked,
        "slept": makespan / ideal([seconds for _, seconds in sorted(slept)]),
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
        print(
            f"\n{order}: ideal {asked:.3f} s\n{'':22}{'makespan':>10}{'x ideal':>10}{'x ideal as slept':>18}"
        )
        for method in options.methods:
            makespan, by_asked, by_slept = (
                median(results[method][what] for results in rounds) for what in ("makespan", "asked", "slept")
            )
            print(f"{method:22}{makespan:>8.3f} s{by_asked:>10.3f}{by_slept:>18.3f}")


if __name__ == "__main__":
    main()
