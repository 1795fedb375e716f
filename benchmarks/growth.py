"""
How jobq's cost grows: with items, their size, stages, workers and retries. Fresh process per point.

    python -m benchmarks.growth [--curve items size …] [--rounds 3] [--backend joinable] [--quick]

The seconds and the driver's CPU time of a run of one item are taken off, so what is seen is the cost of
going on, not that of starting. The driver is the thread that calls `run`; its chunks are what it gives to
consumers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import results
from benchmarks.workloads import Wrong, nothing, numbers, same
from jobq import Job, Pipeline, Retry
from jobq.scheduler import Scheduler

ROOT = Path(__file__).parent.parent
ITEM, DRIVER, CHUNK = "us an item", "driver's CPU us an item", "driver's CPU us a chunk"


@cache
def blocks(size: int) -> list[bytes]:
    """Return a few different ones of that size."""
    return [bytes([number]) * size for number in range(8)]


def payloads(count: int, size: int) -> Iterator[bytes]:
    """Give the blocks in turn."""
    for number in range(count):
        yield blocks(size)[number % 8]


def look(payload: bytes) -> None:
    """See that the two ends are the same."""
    if payload[0] != payload[-1]:
        raise Wrong("changed on the way")


def maybe_again(number: int, job: Job, percent: int) -> None:
    """Ask for a retry the first time, for so many of a hundred items."""
    if job.attempt == 1 and number * 37 % 100 < percent:
        raise Retry(0)


def by_items(at: int) -> tuple[Pipeline, int, dict[str, Any]]:
    """One stage of two workers."""
    pipeline = Pipeline("growth")
    pipeline.producer(numbers)
    pipeline.consumer(nothing, name="work", workers=2)
    return pipeline, at, {}


def by_size(at: int) -> tuple[Pipeline, int, dict[str, Any]]:
    """Half a gigabyte at most, 200,000 items at most."""
    pipeline = Pipeline("growth")
    pipeline.producer(payloads)
    pipeline.consumer(look, name="work", workers=2)
    blocks(at)
    return pipeline, max(8, min(200_000, 500_000_000 // at)), {"size": at}


def by_stages(at: int) -> tuple[Pipeline, int, dict[str, Any]]:
    """So many stages of one worker."""
    pipeline = Pipeline("growth")
    pipeline.producer(numbers)
    for number in range(at - 1):
        pipeline.consumer(same, name=f"work{number}")
    pipeline.consumer(nothing, name="work")
    return pipeline, 300_000, {}


def by_workers(at: int) -> tuple[Pipeline, int, dict[str, Any]]:
    """So many workers, most of them idle."""
    pipeline = Pipeline("growth")
    pipeline.producer(numbers)
    pipeline.consumer(nothing, name="work", workers=at)
    return pipeline, 1_000_000, {}


def by_retries(at: int) -> tuple[Pipeline, int, dict[str, Any]]:
    """So many of a hundred items are tried twice."""
    pipeline = Pipeline("growth")
    pipeline.producer(numbers)
    pipeline.consumer(maybe_again, name="work", workers=2, max_retries=1)
    return pipeline, 100_000, {"percent": at}


@dataclass(frozen=True)
class Curve:
    """What is varied, where it is looked at, and what is drawn."""

    name: str
    title: str
    across: str
    points: Sequence[int]
    make: Callable[[int], tuple[Pipeline, int, dict[str, Any]]]
    lines: Sequence[str] = (ITEM, DRIVER)
    logarithmic: bool = True


CURVES = {
    curve.name: curve
    for curve in (
        Curve("items", "Time per item, by items", "items", [10**n for n in range(3, 8)], by_items),
        Curve("size", "Time per item, by its size", "bytes", [10**n for n in range(1, 9)], by_size),
        Curve("stages", "Time per item, by stages", "stages", range(1, 9), by_stages, logarithmic=False),
        Curve(
            "workers",
            "The driver's time per chunk, by workers",
            "workers",
            [1, 2, 4, 8, 16, 32, 64],
            by_workers,
            (CHUNK, DRIVER),
        ),
        Curve(
            "retries",
            "Time per item, by retries",
            "% of the items tried twice",
            [0, 1, 5, 10, 20, 30, 40, 50],
            by_retries,
            logarithmic=False,
        ),
    )
}


def measure(name: str, at: int, backend: str, items: int | None = None) -> dict[str, float]:
    """Return the costs at one point, in microseconds, over as many items as is usual there or so many."""
    pipeline, count, params = CURVES[name].make(at)
    count = items or count

    def run(wanted: int) -> tuple[float, float, int]:
        before, began, used = chunks[0], time.perf_counter(), time.thread_time()
        report = pipeline.run(count=wanted, backend=backend, params=params)
        taken = time.perf_counter() - began, time.thread_time() - used, chunks[0] - before
        if report.stages["work"].done != wanted:
            raise Wrong(f"{report.stages['work'].done} of {wanted} done")
        return taken

    with counted_chunks() as chunks:
        idle = [run(1) for _ in range(3)]
        seconds, cpu, given = run(count)
    seconds = max(seconds - median(took for took, _, _ in idle), 1e-9)
    cpu = max(cpu - median(used for _, used, _ in idle), 1e-9)
    return {
        ITEM: seconds / count * 1e6,
        DRIVER: cpu / count * 1e6,
        CHUNK: cpu / given * 1e6,
        "items a chunk": count / given,
    }


@contextmanager
def counted_chunks() -> Iterator[list[int]]:
    """Give a list of one number: how many chunks were given to consumers so far."""
    chunks, take = [0], Scheduler.take

    def counting(*arguments: Any, **options: Any) -> Any:
        chunk = take(*arguments, **options)
        chunks[0] += chunk is not None
        return chunk

    Scheduler.take = counting  # type: ignore[method-assign]  # counted from outside: jobq doesn't
    try:
        yield chunks
    finally:
        Scheduler.take = take  # type: ignore[method-assign]


def fresh(name: str, at: int, backend: str) -> dict[str, float]:
    """Return one measurement, made by a new Python."""
    argv = [sys.executable, "-m", "benchmarks.growth", "--measure", name, str(at), "--backend", backend]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, timeout=300, check=True, text=True)
    return dict(json.loads(done.stdout))


def curve_points(curve: Curve, points: Sequence[int], rounds: int, backend: str) -> list[dict[str, Any]]:
    """Return medians, least and most for each point, the points interleaved."""
    found = [[fresh(curve.name, at, backend) for at in points] for _ in range(rounds)]
    columns = found[0][0]
    return [
        {
            "at": at,
            **{
                name: {column: pick(one[place][column] for one in found) for column in columns}
                for name, pick in (("medians", median), ("least", min), ("most", max))
            },
        }
        for place, at in enumerate(points)
    ]


def main() -> None:
    """Measure the curves, keep and draw them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--curve", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="joinable")
    parser.add_argument("--quick", action="store_true", help="two points of each, once; keeps nothing")
    parser.add_argument("--file", type=Path, default=results.FILE, help="where to keep the results")
    parser.add_argument("--measure", nargs=2, metavar=("CURVE", "AT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, at = options.measure
        print(json.dumps(measure(name, int(at), options.backend)))
        return
    for name in options.curve:
        curve = CURVES[name]
        points, rounds = (curve.points[:2], 1) if options.quick else (curve.points, options.rounds)
        described = {"machine": results.machine(), "backend": options.backend, "rounds": rounds}
        found = curve_points(curve, points, rounds, options.backend)
        for point in found:
            said = ", ".join(f"{value:,.3g} {column}" for column, value in point["medians"].items())
            print(f"{curve.across} {point['at']:,}: {said}", flush=True)
        if not options.quick:
            results.merge(options.file, "growth", name, {**described, "points": found})
    if not options.quick:
        from benchmarks.report import write

        write(options.file)


if __name__ == "__main__":
    main()
