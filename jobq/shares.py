"""
How many workers each stage with ``workers="auto"`` should have, from what its workers were seen to do.

    all have a job, and more waits ──> more, while the cores have room; beyond as many as there are cores
                                       only as long as the stage finishes more a second than before
    some never have one            ──> fewer, after a second of that
    else                           ──> as it is

A stage that waits for the next one starts no jobs, one that waits for the one before it has none: either way
its workers idle, and what they leave of the cores goes to the stage where the work piles up. Pure: no clock,
nothing is measured or started here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

#: How often to look, in seconds.
LOOK_SECONDS = 0.1
#: Workers that have a job for this part of the time are all needed, if more jobs wait for half of it.
FULL, PILED = 0.85, 0.5
#: Workers are given back if those that stay have a job for less than this part of the time: well below
#: FULL, so that they are not asked for again at once.
SPARE = 0.7
#: Looks in a row with workers to spare before they are given back.
PATIENT_LOOKS = 10
#: The part of the cores that is left alone: less than this can't be told from none.
MARGIN = 0.05
#: Beyond the cores, more workers are to bring this part of what they could at the best, or they go again.
PROOF = 0.25
#: None are asked for until so many seconds later, and twice as many each time that it happens again: the
#: first time it may be that other jobs came, which take longer.
HOLD_SECONDS, LONGEST_HOLD = 1.0, 16.0
#: Before a stage is judged, it has to finish so many jobs for each of its workers.
JOBS_TO_JUDGE = 4


def most(cores: float) -> int:
    """Return how many workers all automatic stages of a run may have together."""
    return max(32, 4 * math.ceil(cores))


@dataclass(frozen=True, slots=True)
class Seen:
    """
    What one stage did from one look to the next.

    ``workers`` are those that are up, ``changing`` says that some are still starting or going. ``busy`` is
    the part of their time in which they had jobs, ``piled`` that in which more jobs waited. ``load`` is
    how many of them compute at a time, given a core whenever they want one. ``finished`` counts jobs since
    the run began.
    """

    workers: int
    busy: float
    piled: float
    load: float
    finished: int
    changing: bool = False


@dataclass(slots=True)
class Gauge:
    """Adds up for how long lanes were in use and jobs waited, from what holds at each moment."""

    at: float
    since: float = 0.0
    in_use: float = 0.0
    waits: bool = False
    busy: float = 0.0
    piled: float = 0.0

    def __post_init__(self) -> None:
        self.since = self.at

    def note(self, now: float, in_use: float, *, waits: bool) -> None:
        """Let it be so from *now* on: *in_use* of the lanes have a job, and more jobs wait or not."""
        self._add(now)
        self.in_use, self.waits = in_use, waits

    def read(self, now: float) -> tuple[float, float]:
        """Return the part of the lanes in use, and of the time in which jobs waited, and begin anew."""
        self._add(now)
        seconds = max(now - self.since, 1e-9)
        busy, piled = self.busy / seconds, self.piled / seconds
        self.since, self.busy, self.piled = now, 0.0, 0.0
        return busy, piled

    def _add(self, now: float) -> None:
        self.busy += self.in_use * (now - self.at)
        self.piled += self.waits * (now - self.at)
        self.at = now


@dataclass(slots=True)
class Share:
    """What is remembered of one stage."""

    settled: bool = False  # its last change was over at the last look
    since: float | None = None  # since when it has been full, with as many workers as now
    finished: int = 0  # until then
    trial: tuple[int, float] | None = None  # workers, and jobs a second, before they were made more
    held_until: float = -math.inf
    hold_seconds: float = HOLD_SECONDS  # the next time
    spare_looks: int = 0
    needed: float = 0.0  # the most workers that had a job at one of those looks

    def hold(self, now: float) -> None:
        """Ask for no more workers for a while."""
        self.rest()
        self.held_until = now + self.hold_seconds
        self.hold_seconds = min(2 * self.hold_seconds, LONGEST_HOLD)

    def rest(self) -> None:
        """Take it as a stage that is not full."""
        self.since = self.trial = None


@dataclass(slots=True)
class Shares:
    """The stages with ``workers="auto"`` of one run, on so many *cores*."""

    cores: float
    _shares: dict[str, Share] = field(default_factory=dict)

    def start(self, names: Iterable[str], others: int) -> dict[str, int]:
        """Return with how many workers each of these stages begins, beside *others* that are fixed."""
        stages = list(names)
        self._shares = {name: Share() for name in stages}
        each = max(1, int(self.cores - others) // max(1, len(stages)))
        return dict.fromkeys(stages, each)

    def hold(self, name: str, now: float) -> None:
        """Ask for no more workers of this stage for a while."""
        self._shares[name].hold(now)

    def look(self, now: float, seen: Mapping[str, Seen], load: float) -> dict[str, int]:
        """
        Return the stages whose number of workers should change, with that number.

        *load* is the same for all of the run's processes, these stages among them.
        """
        wanted = {name: self._judge(self._shares[name], one, now) for name, one in seen.items()}
        changes = {name: count for name, count in wanted.items() if count < seen[name].workers}
        room = self.cores * (1 - MARGIN) - load
        left = most(self.cores) - sum(one.workers for one in seen.values())
        for name in sorted(seen, key=lambda name: seen[name].workers):
            one, share = seen[name], self._shares[name]
            if share.since is None or wanted[name] != one.workers or now < share.held_until:
                continue
            more = min(self._more(one, room), left)
            if more > 0 and self._may_grow(share, one, now):
                changes[name] = one.workers + more
                room -= more * one.load / one.workers
                left -= more
        for name in changes:
            self._shares[name].settled = False
        return changes

    def _judge(self, share: Share, one: Seen, now: float) -> int:
        """Return how many workers to have at the most; note whether more are wanted."""
        if one.changing or not one.workers:
            share.settled = False
            return one.workers
        if not share.settled:  # the change came in the middle of what was seen
            share.settled = True
            share.since, share.finished, share.spare_looks = None, one.finished, 0
            if share.trial is not None:
                share.since = now
            return one.workers
        if one.busy < FULL or one.piled < PILED:
            share.rest()
            return self._without_spare(share, one)
        share.spare_looks = 0
        if share.since is None:
            share.since, share.finished = now, one.finished
        return self._on_trial(share, one, now)

    @staticmethod
    def _without_spare(share: Share, one: Seen) -> int:
        """Return how many workers to keep of a stage that is not full."""
        needed = one.busy * one.workers
        if needed > SPARE * (one.workers - 1):
            share.spare_looks = 0
            return one.workers
        share.needed = max(needed, share.needed) if share.spare_looks else needed
        share.spare_looks += 1
        if share.spare_looks < PATIENT_LOOKS:
            return one.workers
        return min(one.workers, max(1, math.ceil(share.needed / SPARE)))

    def _on_trial(self, share: Share, one: Seen, now: float) -> int:
        """Return as many workers as the stage had before if it is no faster for having more."""
        rate = self._rate(share, one, now)
        if share.trial is None or rate is None:
            return one.workers
        (before, slower), share.trial = share.trial, None
        if rate >= slower * (1 + PROOF * (one.workers / before - 1)):
            share.hold_seconds = HOLD_SECONDS
            return one.workers
        share.hold(now)
        return before

    @staticmethod
    def _rate(share: Share, one: Seen, now: float) -> float | None:
        """Return the jobs a second since the stage is full; None: there were not enough of them to tell."""
        if share.since is None or now <= share.since:
            return None
        finished = one.finished - share.finished
        return finished / (now - share.since) if finished >= JOBS_TO_JUDGE * one.workers else None

    def _more(self, one: Seen, room: float) -> int:
        """Return how many more workers would fill the room; at most as many again, or up to the cores."""
        if room <= 0:
            return 0
        each = one.load / one.workers
        more = min(one.workers, math.ceil(room / each)) if each > 0 else one.workers
        return min(more, math.ceil(self.cores) - one.workers) if one.workers < self.cores else more

    def _may_grow(self, share: Share, one: Seen, now: float) -> bool:
        """Whether the stage may have more: up to the cores at once, then on trial, if it can be judged."""
        if share.trial is not None:
            return False
        if one.workers < self.cores:
            return True
        rate = self._rate(share, one, now)
        if rate is not None:
            share.trial = (one.workers, rate)
        return rate is not None
