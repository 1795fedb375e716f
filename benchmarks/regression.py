"""
Is jobq still as cheap, compared with the raw queue, as when it was recorded?

    .ci/regression            exit status 1 if it is not
    .ci/regression --record   what is measured now is what to compare with

What is compared is CPU time, not the clock's: of all processes together, jobq's against the raw queue's for
the same workload, one right after the other. So a slow machine slows both sides, and a busy one takes away
time that is not counted. (Instructions would be steadier, but virtual machines seldom let one count them, and
under valgrind another program runs: chunks follow the time that jobs take.) A workload that looks worse is
measured again, with three times the rounds, before that is believed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

from benchmarks.results import BASELINE
from benchmarks.run import measured
from benchmarks.workloads import WORKLOADS

RECORD = Path(__file__).parent.parent / ".ci" / "regression.json"
JOBQ = "jobq-joinable"
#: How many items: enough for the cost of starting not to be what is measured.
COUNTS = {
    "W1": {JOBQ: 2_000_000, BASELINE: 50_000},
    "W2-dicts": {JOBQ: 50_000, BASELINE: 20_000},
    "W2-dataclasses": {JOBQ: 30_000, BASELINE: 15_000},
    "W5": {JOBQ: 3_000, BASELINE: 5_000},
    "W6": {JOBQ: 500_000, BASELINE: 20_000},
}
#: The part of the recorded value below which it is a regression.
TOLERATED = 0.75


def gain(workload: str, rounds: int) -> float:
    """Return how many times the CPU time of jobq's item a raw queue's takes: the median of the rounds."""
    found = []
    for _ in range(rounds):
        cost = {}
        for name, count in COUNTS[workload].items():
            one = measured(WORKLOADS[workload], name, count)
            if "cpu" not in one:
                raise SystemExit(f"{workload} {name}: {one}")
            cost[name] = one["cpu"] / count
        found.append(float(cost[BASELINE] / cost[JOBQ]))
    return median(found)


def main() -> None:
    """Compare with the record, or make it."""
    parser = argparse.ArgumentParser(prog=".ci/regression", description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="write down what is measured now")
    options = parser.parse_args()
    if options.record:
        found = {name: round(gain(name, options.rounds * 3), 2) for name in COUNTS}
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{RECORD}: {found}")
        return
    worse = []
    for name, recorded in json.loads(RECORD.read_text()).items():
        now = gain(name, options.rounds)
        if now < recorded * TOLERATED:
            now = gain(name, options.rounds * 3)
        word = "ok"
        if now < recorded * TOLERATED:
            word = "WORSE"
            worse.append(name)
        print(f"{name:16}{now:8.2f} x cheaper than raw; recorded {recorded:.2f}  {word}", flush=True)
    if worse:
        raise SystemExit(f"costs more CPU time than recorded: {', '.join(worse)}.")


if __name__ == "__main__":
    main()
