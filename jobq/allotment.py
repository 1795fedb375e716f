"""Watches what the stages with ``workers="auto"`` do with their workers, and says when they need others."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from jobq.pool import Member, Pool
from jobq.shares import LOOK_SECONDS, Gauge, Seen, Shares

#: A cgroup's quota: microseconds of computing in so many; a container sees its own there.
QUOTA = Path("/sys/fs/cgroup/cpu.max")


class Allotment:
    """The automatic stages of a run: tell it of every step by `note`; from ``look_at`` on, `look`."""

    def __init__(
        self, pools: Sequence[Pool], automatic: Sequence[Pool], now: float, *, threads: bool
    ) -> None:
        self.look_at = now + LOOK_SECONDS
        self._pools = pools
        self._threads = threads
        self._gauges = [(pool, Gauge(now)) for pool in automatic]
        others = sum(pool.size for pool in pools if pool not in automatic)
        self._shares = Shares(cores(threads=threads))
        for name, size in self._shares.start([pool.line.name for pool in automatic], others).items():
            next(pool for pool in automatic if pool.line.name == name).resize(size)
        self._looked = now
        self._wanted: dict[str, float] = {}  # seconds, by worker, as of the last look

    @property
    def idle(self) -> bool:
        """Whether there is nothing to look for: no jobs, and no worker that could go."""
        return not any(pool.line.flying or pool.size > 1 for pool, _ in self._gauges)

    def note(self, now: float) -> None:
        """Take down what the stages' workers have to do from now on."""
        for pool, gauge in self._gauges:
            line = pool.line
            lanes = line.each * len(pool.members)
            in_use = sum([min(line.each, load) for load in line.loads.values()])
            waits = line.unsettled - line.resting > in_use
            gauge.note(now, in_use / lanes if lanes else 0.0, waits=waits)

    def hold(self, pool: Pool, now: float) -> None:
        """Ask for no more workers of a stage for a while: the system refused one."""
        self._shares.hold(pool.line.name, now)

    def look(self, now: float) -> list[tuple[Pool, int]]:
        """Return the stages that should have more workers, or fewer, with their number."""
        seconds, self._looked, self.look_at = now - self._looked, now, now + LOOK_SECONDS
        loads = self._loads(max(seconds, 1e-3))
        seen = {}
        for pool, gauge in self._gauges:
            busy, piled = gauge.read(now)
            up = sum(member.open for member in pool.members)
            changing = not up == len(pool.members) == pool.size
            seen[pool.line.name] = Seen(up, busy, piled, loads[pool.line.name], pool.finished, changing)
        changes = self._shares.look(now, seen, sum(loads.values()))
        return [(pool, changes[pool.line.name]) for pool, _ in self._gauges if pool.line.name in changes]

    def _loads(self, seconds: float) -> dict[str, float]:
        """Return how many of each stage's workers wanted to compute on average; "" is this program."""
        before, self._wanted = self._wanted, {}
        loads = {
            pool.line.name: sum(
                self._load_of(member, before, seconds) for member in pool.members if not self._threads
            )
            for pool in self._pools
        }
        if self._threads:  # nobody knows which is which stage's: all of it is the program's
            loads[""] = self._load("", wanted_seconds("/proc/self/task/*"), before, seconds) or 0.0
        elif self._wanted:
            own = wanted_seconds(f"/proc/self/task/{threading.get_native_id()}")
            loads[""] = self._load("", own, before, seconds) or 0.0
        return loads

    def _load_of(self, member: Member, before: dict[str, float], seconds: float) -> float:
        wanted = wanted_seconds(f"/proc/{member.worker.pid}/task/*")
        load = self._load(member.worker.name, wanted, before, seconds)
        # Where it can't be known whether a worker waits, take it that it computes.
        return float(bool(member.load or member.pool.line.is_producer)) if load is None else load

    def _load(self, who: str, wanted: float | None, before: dict[str, float], seconds: float) -> float | None:
        if wanted is None:
            return None
        self._wanted[who] = wanted
        return max(0.0, wanted - before.get(who, wanted)) / seconds


def wanted_seconds(tasks: str) -> float | None:
    """
    Return for how many seconds these threads of the kernel's have computed, or been ready to, until now.

    Being ready counts, since a worker that has to share its core with others wants no company of its own
    stage. None where the kernel does not tell. Programs that a job starts are not counted.
    """
    folder, every, _ = tasks.partition("*")
    seconds = 0.0
    try:
        for task in Path(folder).iterdir() if every else [Path(folder)]:
            computed, ready, _ = (task / "schedstat").read_text().split()
            seconds += (int(computed) + int(ready)) / 1e9
    except (OSError, ValueError):
        return None
    return seconds


def cores(*, threads: bool) -> float:
    """Return how many cores this program may use; of its threads only one can compute at a time."""
    if threads and getattr(sys, "_is_gil_enabled", lambda: True)():
        return 1.0
    known = getattr(os, "process_cpu_count", None) or _affinity
    quota, period = "max", "1"
    with contextlib.suppress(OSError, ValueError):
        quota, period = QUOTA.read_text().split()
    count = float(known() or 1)
    return count if quota == "max" else min(count, int(quota) / int(period))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
