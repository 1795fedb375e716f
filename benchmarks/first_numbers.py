"""
How many tiny ints a second go from one producer to two consumers, against the textbook program?

    python benchmarks/first_numbers.py [--quick]

Each measurement has a fresh process. A round measures everything once, one after the other, and each
ratio is taken within its round, so that what slows the machine for a while slows both sides of it.
Times include starting and ending the workers, not the interpreter's start and imports.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import raw_joinable
from fresh import in_fresh_process, machine

from jobq import Pipeline

BACKENDS = ("joinable", "sentinel", "pipe", "thread", "inline")
pipeline = Pipeline("first_numbers")


@pipeline.producer
def numbers(items: int, cpu_file: Path) -> Iterator[int]:
    """Give 0, 1, 2, …; leave behind the CPU seconds that this worker's thread has used."""
    yield from range(items)
    cpu_file.write_text(str(time.thread_time()))


@pipeline.consumer(workers=2)
def take(number: int) -> None:
    """Do nothing: what is measured is the way here."""


def cpu_seconds() -> tuple[float, float]:
    """Return the CPU seconds that this process has used, and those of its children that have ended."""
    used = os.times()
    return used.user + used.system, used.children_user + used.children_system


def measure_raw(items: int) -> dict[str, Any]:
    """Measure the textbook program once. Its producer is the main process."""
    own, children = cpu_seconds()
    seconds = raw_joinable.run(items)
    own_now, children_now = cpu_seconds()
    return {"seconds": seconds, "producer": own_now - own, "consumers": children_now - children}


def measure_jobq(items: int, backend: str) -> dict[str, Any]:
    """Measure jobq once, untuned and validating. Its workers' CPU time is known where they are processes."""
    with tempfile.TemporaryDirectory() as folder:
        cpu_file = Path(folder, "producer")
        own, children = cpu_seconds()
        began = time.perf_counter()
        report = pipeline.run(items=items, cpu_file=cpu_file, backend=backend)
        seconds = time.perf_counter() - began
        own_now, children_now = cpu_seconds()
        producer = float(cpu_file.read_text())
    assert report.stages["take"].done == items
    driver, workers = own_now - own, children_now - children
    if not workers:  # threads: one process has used it all
        return {"seconds": seconds, "together": driver}
    return {"seconds": seconds, "producer": producer, "driver": driver, "consumers": workers - producer}


def measure(name: str, items: int) -> dict[str, Any]:
    """Return what one run of *name* took, with its rate."""
    result = measure_raw(items) if name == "raw" else measure_jobq(items, name)
    return {**result, "rate": items / result["seconds"]}


def table(rounds: list[dict[str, dict[str, Any]]], counts: dict[str, int]) -> Iterator[str]:
    """Yield the lines that compare: medians over the rounds, the ratios' smallest and largest."""
    yield f"{'':10}{'items':>11}{'items/s':>12}{'x raw':>8}{'min - max':>16}   CPU microseconds an item"
    for name, items in counts.items():
        ratios = [results[name]["rate"] / results["raw"]["rate"] for results in rounds]
        where = ", ".join(
            f"{part} {median(results[name][part] for results in rounds) / items * 1e6:.2f}"
            for part in ("producer", "driver", "consumers", "together")
            if part in rounds[0][name]
        )
        rate = median(results[name]["rate"] for results in rounds)
        spread = f"{min(ratios):.1f} - {max(ratios):.1f}"
        yield f"{name:10}{items:>11,}{rate:>12,.0f}{median(ratios):>8.1f}{spread:>16}   {where}"


def main() -> None:
    """Measure, a fresh process each, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--raw-items", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=3_000_000)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--quick", action="store_true", help="one small round: shows that it works, no more")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.items)))
        return
    if options.quick:
        options.rounds, options.raw_items, options.items = 1, 10_000, 200_000
    counts = {"raw": options.raw_items} | dict.fromkeys(options.backends, options.items)
    print(f"{machine()}; {options.rounds} rounds, medians")
    rounds = [
        {
            name: in_fresh_process(__file__, "--measure", name, "--items", items)
            for name, items in counts.items()
        }
        for _ in range(options.rounds)
    ]
    print(*table(rounds, counts), sep="\n")


if __name__ == "__main__":
    main()
