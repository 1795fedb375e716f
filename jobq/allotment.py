"""Watches what the stages with ``workers="auto"`` do with their workers, and says when they need others."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobq.pool import Member, Pool
from jobq.shares import LOOK_SECONDS, Gauge, Seen, Shares

#: A cgroup's quota: microseconds of computing in so many; a container sees its own there.
QUOTA = Path("/sys/fs/cgroup/cpu.max")
#: How much of what a thread did until the last look counts beside what it did since.
MEMORY = 0.7


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
        self._habits: dict[str, Habit] = {}  # by thread, as of the last look

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
        self.look_at = now + LOOK_SECONDS
        loads = self._loads(now)
        seen = {}
        for pool, gauge in self._gauges:
            busy, piled = gauge.read(now)
            up = sum(member.open for member in pool.members)
            changing = not up == len(pool.members) == pool.size
            seen[pool.line.name] = Seen(up, busy, piled, loads[pool.line.name], pool.finished, changing)
        changes = self._shares.look(now, seen, sum(loads.values()))
        return [(pool, changes[pool.line.name]) for pool, _ in self._gauges if pool.line.name in changes]

    def _loads(self, now: float) -> dict[str, float]:
        """Return how many of each stage's workers would be computing, given the cores; "" is this program."""
        before, self._habits = self._habits, {}
        loads = {
            pool.line.name: sum(
                self._load_of(member, before, now) for member in pool.members if not self._threads
            )
            for pool in self._pools
        }
        if self._threads:  # nobody knows which is which stage's: all of it is the program's
            loads[""] = self._load("/proc/self/task/*", before, now) or 0.0
        elif self._habits:
            own = f"/proc/self/task/{threading.get_native_id()}"
            loads[""] = self._load(own, before, now) or 0.0
        return loads

    def _load_of(self, member: Member, before: dict[str, Habit], now: float) -> float:
        load = self._load(f"/proc/{member.worker.pid}/task/*", before, now)
        # Where it can't be known whether a worker waits, take it that it computes.
        return float(bool(member.load or member.pool.line.is_producer)) if load is None else load

    def _load(self, tasks: str, before: dict[str, Habit], now: float) -> float | None:
        times = thread_times(tasks)
        if times is None:
            return None
        habits = {thread: before.get(thread) or Habit(now, *spent) for thread, spent in times.items()}
        self._habits |= habits
        return sum(habit.look(now, *times[thread]) for thread, habit in habits.items())


@dataclass(slots=True)
class Habit:
    """How a thread spends its time, of late: what it has ``computed`` and was ``ready`` to, in seconds."""

    at: float
    computed: float
    ready: float
    _recent: tuple[float, float] = (0.0, 0.0)

    def look(self, now: float, computed: float, ready: float) -> float:
        """
        Return for what part of its time it would compute if it had a core whenever it wants one.

        On a busy machine a job that computes gets a core now and then, and one that waits is late to go on:
        neither shows in the time computed alone. The kernel tells of the time that a thread was ready when
        that is over, so looks before this one count too.
        """
        busy, own = self._recent
        busy = busy * MEMORY + computed - self.computed
        own = own * MEMORY + (now - self.at) - (ready - self.ready)
        self.at, self.computed, self.ready, self._recent = now, computed, ready, (busy, own)
        return busy / max(busy, own) if busy > 0 else 0.0


def thread_times(tasks: str) -> dict[str, tuple[float, float]] | None:
    """
    Return for how many seconds each thread has computed, and been ready to, until now.

    None where the kernel does not tell. Programs that a job starts are not counted.
    """
    folder, every, _ = tasks.partition("*")
    times = {}
    try:
        for task in Path(folder).iterdir() if every else [Path(folder)]:
            computed, ready, _ = (task / "schedstat").read_text().split()
            times[str(task)] = (int(computed) / 1e9, int(ready) / 1e9)
    except (OSError, ValueError):
        return None
    return times


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
