"""What was measured, on disk: one JSON file, to which each run adds or replaces its workloads."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.workloads import Workload

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
FILE = FOLDER / "results.json"
BASELINE = "raw-joinable"

#: A round: what each contestant's measurement returned.
Round = dict[str, dict[str, Any]]


def machine() -> str:
    """Return a line that describes this machine, with its load: other programs' work spoils the numbers."""
    cpu = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {gigabytes:.0f} GB, "
        f"{system}, load {os.getloadavg()[0]:.1f} at the start"
    )


def versions() -> str:
    """Return the peers that are here, with their versions."""

    def known() -> Iterator[str]:
        for name in ("joblib", "mpire", "pypeln", "ray", "numpy", "pydantic"):
            try:
                yield f"{name} {version(name)}"
            except PackageNotFoundError:
                yield f"{name} not here"

    return ", ".join(known())


def read(file: Path) -> dict[str, Any]:
    """Return what the file holds by section, or nothing."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def merge(file: Path, section: str, name: str, found: dict[str, Any]) -> None:
    """The file holds what was *found* under that name, with the day; all else is as it was."""
    everything = read(file)
    everything.setdefault(section, {})[name] = {"day": dt.datetime.now(dt.UTC).date().isoformat(), **found}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(everything, indent=1) + "\n")


def values(rounds: list[Round], name: str) -> list[float]:
    """Return the contestant's value in each round that has one."""
    return [found["value"] for found in (row.get(name, {}) for row in rounds) if "value" in found]


def ratios(rounds: list[Round], name: str) -> list[float]:
    """Return the contestant's value in terms of the baseline's, within each round."""
    both = [(row.get(name, {}).get("value"), row.get(BASELINE, {}).get("value")) for row in rounds]
    return [mine / theirs for mine, theirs in both if mine is not None and theirs]


def trouble(rounds: list[Round], name: str) -> str:
    """Return why some round has no value for the contestant; nothing if all have one."""
    words = {"absent": "not here", "cannot": "can't", "wrong": "WRONG", "failed": "failed"}
    for row in rounds:
        for kind, word in words.items():
            if kind in row.get(name, {}):
                return f"{word}: {row[name][kind]}"
    return ""


def reached(workload: Workload, rounds: list[Round], name: str) -> float | None:
    """Return the median of what the goal is about, or None if there is nothing."""
    of_goal = ratios(rounds, name) if workload.goal_of == "raw" else values(rounds, name)
    return median(of_goal) if of_goal else None
