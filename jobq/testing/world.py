"""
The world that a simulated run lives in: chance from a seed, a clock that nobody waits for, what is to come.

Time passes only while the driver waits, and at once. What happens meanwhile is a heap of actions with
their times; the same seed gives the same world, and so the same run.
"""

from __future__ import annotations

import heapq
import math
import selectors
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from random import Random
from typing import Any, Protocol

from jobq.errors import PipelineError

#: A run that has waited so often does not end; nor one that has with nothing to come, or no time passing.
WAITS = 1_000_000
WAITS_IN_VAIN = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """
    How often things go wrong in a simulated run, each a chance from 0 to 1.

    - ``deaths``: that a worker dies, for each job, order and start of it;
    - ``failures``: that a job (or a producer) raises `InjectedFailure`, before or after your function ran;
    - ``delays``: that a job, an answer or a start takes far longer than others;
    - ``races``: that a worker begins a job in the very moment in which it is taken back;
    - ``signals``: that a run is stopped: by one signal, two or three, or since nobody wants its results.

    Each seed leaves some kinds out and lets others come more often: what one fault shows another may hide.
    """

    deaths: float = 0.03
    failures: float = 0.03
    delays: float = 0.08
    races: float = 0.4
    signals: float = 0.1

    def __post_init__(self) -> None:
        wrong = [f"{one.name}={getattr(self, one.name)!r}" for one in fields(self)]
        wrong = [
            text
            for one, text in zip(fields(self), wrong, strict=True)
            if not 0 <= getattr(self, one.name) <= 1
        ]
        if wrong:
            raise PipelineError(f"Faults: {', '.join(wrong)}: chances are from 0 to 1.")

    def drawn(self, chance: Random) -> Faults:
        """Return these faults for one run: some kinds not at all, others more often."""
        return Faults(
            **{
                one.name: min(1.0, getattr(self, one.name) * chance.choice((0, 1, 1, 3)))
                for one in fields(self)
            }
        )


class InjectedFailure(Exception):
    """What a job raises where the simulation lets it fail."""


class Violation(Exception):
    """Something happened that must never happen."""


class Readable(Protocol):
    """Something that the driver hears: a worker."""

    fd: int


class World:
    """What time it is, what is to come, and who can be heard. The `jobq.driver.Clock` of a simulated run."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.chance = Random(seed)
        self.faults = faults.drawn(self.chance)
        self.now = 1000.0
        self.told: list[tuple[Any, ...]] = []
        self.woken = False
        self.readable: dict[int, None] = {}
        #: Seconds that an ordinary job takes, and that the driver may be behind.
        self.pace = self.chance.choice((0.0002, 0.001, 0.01))
        self.lag = self.pace * self.chance.choice((0.0, 0.3, 2.0))
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    def monotonic(self) -> float:
        """Return the seconds."""
        return self.now

    def monotonic_ns(self) -> int:
        """Return the nanoseconds."""
        return round(self.now * 1e9)

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        """Let *action* happen *seconds* from now."""
        self._serial += 1
        heapq.heappush(self._due, (self.now + seconds, self._serial, action))

    def tell(self, *what: Any) -> None:
        """Note what happened now."""
        self.told.append((self.now, *what))

    def takes(self) -> float:
        """Return how long something takes: mostly little, sometimes much longer."""
        chance = self.chance.random
        seconds = self.pace * (0.2 + chance())
        return seconds * 10 ** (1 + 3 * chance()) if chance() < self.faults.delays else seconds

    def travels(self) -> float:
        """Return how long something is under way."""
        seconds = self.pace * 0.2 * self.chance.random()
        return seconds * 100 if self.chance.random() < self.faults.delays else seconds

    def pass_until(self, deadline: float) -> bool:
        """Let time pass until somebody can be heard, or *deadline*; return whether that leads anywhere."""
        due, pop, began = self._due, heapq.heappop, self.now
        while not (self.readable or self.woken):
            if not due or due[0][0] > deadline:
                if deadline == math.inf:
                    raise Violation("the run hangs: the driver waits, and nothing will ever happen")
                self.now = max(self.now, deadline)
                return bool(due) and self.now > began
            self.now, _, action = pop(due)
            action()
        until = min(deadline, self.now + self.lag * self.chance.random())
        while due and due[0][0] <= until:
            self.now, _, action = pop(due)
            action()
        return True


class Waiter(selectors.BaseSelector):
    """The driver's selector in a simulated run: while it waits, time passes. Tells some of those it could."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._keys: dict[int, selectors.SelectorKey] = {}
        self.waits = 0
        self._in_vain = 0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch for *fileobj*, a number."""
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, fileobj, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Watch for it no longer."""
        return self._keys.pop(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Return what is watched."""
        return self._keys

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Let time pass until somebody can be heard; return those, or some of them, in an odd order."""
        world, keys = self._world, self._keys
        hopeful = world.pass_until(math.inf if timeout is None else world.now + timeout)
        world.woken = False
        ready = [(keys[fd], selectors.EVENT_READ) for fd in world.readable if fd in keys]
        self.waits += 1
        self._in_vain = 0 if hopeful else self._in_vain + 1
        if self.waits > WAITS or self._in_vain > WAITS_IN_VAIN:
            raise Violation("the run does not end: the driver goes round and round")
        if len(ready) > 1:
            world.chance.shuffle(ready)
            if world.chance.random() < world.faults.delays:
                del ready[1:]
        return ready
