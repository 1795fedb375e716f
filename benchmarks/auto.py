"""
How near ``workers="auto"`` comes to the best fixed split: three mixes that compute, three that wait.

    python -m benchmarks.auto [--mix front back …] [--rounds 3] [--backend joinable] [--items 1000]

Two stages, one after the other; a mix says for how many milliseconds each has a job in its first half and in
its second. The splits by hand are those that a person would try: around one worker a core where jobs compute,
all ways to share out eight workers where they wait. Automatic stages that wait may have more: the last
column says how many there were at once. A round measures everything once, each in a fresh process; the best
split is that with the lowest median, and the ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import results
from jobq import Pipeline
from jobq.events import Event, WorkerEnded, WorkerLostEvent, WorkerStarted
from jobq.options import RunOptions

ROOT = Path(__file__).parent.parent
AUTO = "auto auto"
#: The head of the table of which `row` makes the rows.
HEADER = (
    "| mix | best by hand | s | worst by hand | s | auto, s | auto / best (least to most) | most workers |",
    "|---|---|--:|---|--:|--:|--:|--:|",
)
Phase = tuple[float, float]
FRONT, BACK = (6.0, 1.0), (1.0, 6.0)
AROUND_TWO_CORES = ["1 1", "1 2", "2 1", "2 2", "1 3", "3 1"]
OF_EIGHT = [f"{first} {8 - first}" for first in range(1, 8)]


@dataclass(frozen=True)
class Mix:
    """What the jobs of the two stages do, for so many milliseconds, and the splits to try."""

    waits: bool
    first_half: Phase
    second_half: Phase
    splits: list[str]


MIXES = {
    "front": Mix(False, FRONT, FRONT, AROUND_TWO_CORES),
    "back": Mix(False, BACK, BACK, AROUND_TWO_CORES),
    "changing": Mix(False, FRONT, BACK, AROUND_TWO_CORES),
    "front-waits": Mix(True, (20, 4), (20, 4), OF_EIGHT),
    "back-waits": Mix(True, (4, 20), (4, 20), OF_EIGHT),
    "changing-waits": Mix(True, (20, 4), (4, 20), OF_EIGHT),
}


def compute(milliseconds: float) -> None:
    """Use the core for so long, however long that takes."""
    end = time.thread_time() + milliseconds / 1000
    while time.thread_time() < end:
        pass


def wait(milliseconds: float) -> None:
    """Leave the core to others for so long."""
    time.sleep(milliseconds / 1000)


def pipeline(mix: Mix, items: int, split: str) -> Pipeline:
    """Return the two stages with so many workers each, or as many as they choose."""
    made = Pipeline("auto")
    work: Callable[[float], None] = wait if mix.waits else compute

    def number() -> Iterator[int]:
        yield from range(items)

    def phase(item: int) -> Phase:
        return mix.first_half if item < items // 2 else mix.second_half

    def first(item: int) -> int:
        work(phase(item)[0])
        return item

    def second(item: int) -> int:
        work(phase(item)[1])
        return item

    made.producer(number)
    for function, workers in zip((first, second), split.split(), strict=True):
        made.consumer(function, workers=workers if workers == "auto" else int(workers))
    return made


def measure(mix: Mix, items: int, split: str, backend: str) -> tuple[float, int]:
    """Return the seconds of a run, and how many workers the two stages had at once."""
    up: set[str] = set()
    most = 0

    def watch(event: Event) -> None:
        nonlocal most
        if isinstance(event, WorkerStarted) and event.stage != "number":
            up.add(event.worker)
            most = max(most, len(up))
        elif isinstance(event, WorkerEnded | WorkerLostEvent):
            up.discard(event.worker)

    outcome = pipeline(mix, items, split).execute(RunOptions(backend=backend), {}, observers=[watch])
    report = outcome.report
    if not report.ok or report.stages["second"].done != items:
        raise RuntimeError(f"not every job was done: {report.stages}")
    return report.seconds, most


def apart(name: str, items: int, split: str, backend: str) -> tuple[float, int]:
    """Return what `measure` does in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.auto", "--mix", name, "--items", str(items)]
    command += ["--backend", backend, "--one", split]
    seconds, most = json.loads(subprocess.check_output(command, cwd=ROOT))
    return seconds, most


def compare(name: str, items: int, rounds: int, backend: str) -> dict[str, Any]:
    """Return the seconds of every split in every round, and tell each measurement on the way."""
    splits = [*MIXES[name].splits, AUTO]
    taken: dict[str, list[float]] = {split: [] for split in splits}
    most = 0
    for number in range(rounds):
        for split in splits if number % 2 == 0 else reversed(splits):
            seconds, workers = apart(name, items, split, backend)
            taken[split].append(seconds)
            most = max(most, workers if split == AUTO else 0)
            print(f"{name:15} round {number + 1}  {split:9} {seconds:7.2f} s", file=sys.stderr, flush=True)
    return {"taken": taken, "most": most}


def row(name: str, found: dict[str, Any]) -> str:
    """Return the row of the table for what `compare` found."""
    taken: dict[str, list[float]] = found["taken"]
    by_hand = sorted((split for split in taken if split != AUTO), key=lambda split: median(taken[split]))
    best, worst = by_hand[0], by_hand[-1]
    ratios = [auto / fixed for auto, fixed in zip(taken[AUTO], taken[best], strict=True)]
    return (
        f"| {name} | {best} | {median(taken[best]):.2f} | {worst} | {median(taken[worst]):.2f} |"
        f" {median(taken[AUTO]):.2f} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        f" {found['most']} |"
    )


def main() -> None:
    """Measure what was asked for and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--backend", default="joinable")
    parser.add_argument("--file", type=Path, default=results.FILE, help="where to keep the results")
    parser.add_argument("--one", metavar="SPLIT", help="only this, in this process, as JSON")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(MIXES[options.mix[0]], options.items, options.one, options.backend)))
        return
    print(*HEADER, sep="\n", flush=True)
    described = {"machine": results.machine(), "backend": options.backend, "rounds": options.rounds}
    for name in options.mix:
        found = compare(name, options.items, options.rounds, options.backend)
        print(row(name, found), flush=True)
        results.merge(options.file, "auto", name, {**described, **found})
    from benchmarks.report import write

    write(options.file)


if __name__ == "__main__":
    main()
