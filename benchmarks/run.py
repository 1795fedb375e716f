"""
Measures all contestants on all workloads, a fresh process each, and writes tables and plots.

    python -m benchmarks [--quick] [--workload W1 …] [--contestant jobq raw …] [--rounds 5]

A round measures every contestant once, one after the other, and ratios are taken within a round, because a
machine's speed drifts from minute to minute. Results go to docs/benchmarks/results.json, workload by
workload, so a run of some replaces only these. ``--quick`` shows in a minute that everything works, with one
small round of a few contestants; its numbers say nothing, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import results
from benchmarks.contestant import NAMES
from benchmarks.results import Round
from benchmarks.workloads import WORKLOADS, Workload

ROOT = Path(__file__).parent.parent
QUICK = ("jobq-joinable", "raw-joinable", "pool", "limit")
#: Seconds after which a measurement is given up.
PATIENCE = 120.0


def measured(workload: Workload, contestant: str, count: int, chunk: int = 0) -> dict[str, Any]:
    """Return what one measurement says; ``failed`` if it breaks or takes too long. Nothing of it is left."""
    argv = [sys.executable, "-m", "benchmarks.measure", workload.name, contestant, str(count), str(chunk)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},  # no threads before a fork
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        first = process.stdout.readline()
        watched = watch(process) if workload.watched and first == "begin\n" else {}
        # not up to the end: a process that a contestant has left behind may keep it open
        answer = next((line for line in chain([first], process.stdout) if line.startswith("{")), "")
        status = process.wait()
        signal.setitimer(signal.ITIMER_REAL, 0)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if status == -signal.SIGKILL:
        return {"failed": f"not done after {PATIENCE:.0f} s"}
    try:
        found: dict[str, Any] = json.loads(answer)
        return {**found, **watched} if "value" in found else found
    except ValueError:
        return {"failed": said[-1] if said else f"exit status {status}"}


# --- the memory of W8


def family(pid: int) -> Iterator[int]:
    """Yield the process and all its descendants."""
    yield pid
    with suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from family(int(child))


def resident(pid: int) -> float:
    """Return the process's resident memory in MB; shared pages count for each."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, IndexError):
        return 0.0


def watch(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return, once it is over, by how much any process grew after the first second, and all samples."""
    began = time.monotonic()
    samples: dict[int, list[tuple[float, float]]] = {}
    ended = os.pidfd_open(process.pid)
    while not select.select([ended], [], [], 0.02)[0]:
        now = time.monotonic() - began
        for pid in family(process.pid):
            if size := resident(pid):
                samples.setdefault(pid, []).append((round(now, 2), round(size, 1)))
    os.close(ended)
    lasted = time.monotonic() - began
    since = min(1.0, lasted / 2)
    grown = []
    for series in samples.values():
        later = [size for now, size in series if now >= since]
        if later:
            grown.append(max(later) - later[0])
    return {"value": max(grown, default=0.0), "memory": list(samples.values()), "since": since}


# --- rounds


def sized(workload: Workload, contestant: str, seconds: float) -> int:
    """Return how many items take about *seconds*, starting and ending the workers left aside."""
    if not workload.sized or (workload.watched and contestant.startswith("jobq")):
        return workload.most
    count = workload.quick
    took = measured(workload, contestant, count).get("seconds", math.inf)
    while count < workload.most and took < seconds * 4:
        more = min(workload.most, count * 8)
        longer = measured(workload, contestant, more).get("seconds", math.inf)
        each = (longer - took) / (more - count)
        count, took = more, longer
        if each * count > seconds / 2:  # no more is the start most of it: now this is what an item takes
            return min(workload.most, max(workload.quick, int(seconds / each)))
    return count


def run(
    workload: Workload, contestants: list[str], rounds: int, seconds: float, quick: bool
) -> dict[str, Any]:
    """Return all rounds of one workload, with the machine and the counts."""
    described = {"machine": results.machine(), "versions": results.versions()}
    if quick:
        counts = dict.fromkeys(contestants, workload.quick)
    else:
        counts = {name: sized(workload, name, seconds * workload.times) for name in contestants}
    done: list[Round] = []
    for number in range(rounds):
        # each round starts with another one, so that none always follows the same
        order = [*contestants[number % len(contestants) :], *contestants[: number % len(contestants)]]
        done.append({name: measured(workload, name, counts[name]) for name in order})
        if number:  # the series are long: one is enough for the plot
            for found in done[-1].values():
                found.pop("memory", None)
    return {**described, "counts": counts, "rounds": done}


def table(workload: Workload, rounds: list[Round], contestants: list[str]) -> Iterator[str]:
    """Yield the lines that compare: medians, and the ratios to the baseline with their extremes."""
    sign = {"more": ">=", "less": "<="}[workload.better]
    goal = f"{sign} {workload.goal:g}{' x raw' if workload.goal_of == 'raw' else ''}"
    yield f"\n{workload.name}: {workload.title}; {workload.unit}; goal {goal}"
    for name in contestants:
        problem = results.trouble(rounds, name)
        ratios = results.ratios(rounds, name)
        spread = f"{median(ratios):9.2f} x raw ({min(ratios):.2f} - {max(ratios):.2f})" if ratios else ""
        found = results.values(rounds, name)
        yield f"  {name:15}{f'{median(found):>16,.3f}' if found else '':16}{spread}  {problem}"


def chosen(names: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    """Return those that begin with what is wanted, or all."""
    return [name for name in names if wanted is None or name.partition("-")[0] in wanted or name in wanted]


def main() -> None:
    """Measure, print, and unless it is quick keep and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workload", nargs="+", help="W1, W2, W2-dicts, …")
    parser.add_argument("--contestant", nargs="+", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.7, help="how long a measurement should last")
    parser.add_argument("--quick", action="store_true", help="one small round of a few: shows that it works")
    parser.add_argument("--chunk", type=int, nargs="+", help="try these chunk sizes, keep nothing")
    parser.add_argument("--file", type=Path, default=results.FILE, help="where to keep the results")
    options = parser.parse_args()
    contestants = chosen(NAMES, options.contestant or (QUICK if options.quick else None))
    print(results.machine())
    for name in chosen(WORKLOADS, options.workload):
        workload = WORKLOADS[name]
        if options.chunk:
            tune(workload, contestants, options.chunk, options.seconds)
            continue
        found = run(
            workload, contestants, 1 if options.quick else options.rounds, options.seconds, options.quick
        )
        print(*table(workload, found["rounds"], contestants), sep="\n", flush=True)
        if not options.quick:
            results.merge(options.file, "workloads", name, found)
    if not options.quick and not options.chunk:
        from benchmarks.report import write

        write(options.file)


def tune(workload: Workload, contestants: list[str], chunks: list[int], seconds: float) -> None:
    """Print what each chunk size gives: where the numbers in `peers` come from."""
    for name in contestants:
        count = sized(workload, name, seconds)
        for chunk in chunks:
            print(
                f"{workload.name} {name} chunk {chunk}: {measured(workload, name, count, chunk)}", flush=True
            )


if __name__ == "__main__":
    main()
