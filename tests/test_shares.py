"""How many workers automatic stages should have: decided from made-up measurements, by a made-up clock."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest

from jobq.shares import HOLD_SECONDS, LONGEST_HOLD, LOOK_SECONDS, PATIENT_LOOKS, Gauge, Seen, Shares, most


@dataclass
class Stage:
    """What a job costs: seconds of computing, seconds of waiting; at most so many jobs a second."""

    computes: float = 0.0
    waits: float = 0.0
    limit: float = float("inf")

    def could(self, workers: int) -> float:
        """Return the jobs a second that so many workers do at the most."""
        return min(self.limit, workers / (self.computes + self.waits))


@dataclass
class Line:
    """Stages one after the other on some cores, as a flow: the slowest of them sets the pace of all."""

    cores: float
    stages: dict[str, Stage]
    noise: random.Random | None = None
    now: float = 0.0
    finished: float = 0.0
    sizes: dict[str, int] = field(default_factory=dict)
    changes: int = 0

    def __post_init__(self) -> None:
        self.shares = Shares(self.cores)
        self.sizes = self.shares.start(self.stages, 0)

    def pace(self, sizes: dict[str, int]) -> float:
        """Return the jobs a second that come out at the end."""
        computing = sum(stage.computes for stage in self.stages.values())
        slowest = min(stage.could(sizes[name]) for name, stage in self.stages.items())
        return min(slowest, self.cores / computing if computing else slowest)

    def best(self, at_most: int) -> float:
        """Return the pace of the best split of not more than so many workers a stage."""
        splits = itertools.product(range(1, at_most + 1), repeat=len(self.stages))
        return max(self.pace(dict(zip(self.stages, split, strict=True))) for split in splits)

    def look(self) -> dict[str, int]:
        """Let the time to the next look go by; return what it changes."""
        self.now += LOOK_SECONDS
        pace = self.pace(self.sizes)
        self.finished += pace * LOOK_SECONDS
        busiest = min(self.stages, key=lambda name: self.stages[name].could(self.sizes[name]))
        seen = {}
        for name, stage in self.stages.items():
            size = self.sizes[name]
            full = name == busiest  # it sets the pace, or is the one that waits for a core
            busy = 1.0 if full else min(1.0, pace * (stage.computes + stage.waits) / size)
            computing = stage.computes / (stage.computes + stage.waits)
            load = size * computing if full and stage.limit == float("inf") else pace * stage.computes
            busy, load = self.about(busy), self.about(load)
            seen[name] = Seen(size, min(1.0, busy), float(full), load, int(self.finished))
        changes = self.shares.look(self.now, seen, sum(one.load for one in seen.values()))
        self.sizes |= changes
        self.changes += bool(changes)
        return changes

    def about(self, value: float) -> float:
        return value * self.noise.uniform(0.92, 1.08) if self.noise else value

    def looks(self, count: int) -> None:
        for _ in range(count):
            self.look()


MIXES = {
    "front-heavy": {"a": Stage(0.006), "b": Stage(0.001)},
    "back-heavy": {"a": Stage(0.001), "b": Stage(0.006)},
    "even": {"a": Stage(0.003), "b": Stage(0.003)},
    "three": {"a": Stage(0.001), "b": Stage(0.008), "c": Stage(0.002)},
    "half waits": {"a": Stage(0.002, 0.006), "b": Stage(0.002)},
    "one waits": {"a": Stage(0.0001, 0.02), "b": Stage(0.001)},
}


@pytest.mark.parametrize("cores", [1, 2, 4, 8])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("noisy", [False, True])
def test_the_pace_comes_within_a_tenth_of_the_best_split(mix: str, cores: int, noisy: bool) -> None:
    line = Line(cores, MIXES[mix], random.Random(1) if noisy else None)

    line.looks(30)

    assert line.pace(line.sizes) >= 0.9 * line.best(at_most=20 if len(line.stages) == 2 else 8)


@pytest.mark.parametrize("cores", [2, 4])
def test_workers_move_when_the_load_does(cores: int) -> None:
    line = Line(cores, MIXES["front-heavy"])
    line.looks(10)
    assert line.sizes["a"] > line.sizes["b"]

    line.stages = MIXES["back-heavy"]
    line.looks(PATIENT_LOOKS + 5)

    assert line.pace(line.sizes) >= 0.9 * line.best(at_most=8)
    assert line.sizes["a"] == 1


@pytest.mark.parametrize("mix", MIXES)
def test_noise_does_not_make_workers_come_and_go(mix: str) -> None:
    line = Line(4, MIXES[mix], random.Random(7))
    line.looks(50)
    line.changes = 0

    line.looks(500)

    # A try of more workers now and then is meant: up, and down again.
    assert line.changes <= 8 + 2 * 500 * LOOK_SECONDS / LONGEST_HOLD


def test_a_stage_that_waits_gets_more_workers_than_cores_while_that_helps() -> None:
    line = Line(2, {"a": Stage(0.0, 0.02)})

    line.looks(20)

    assert line.sizes["a"] == most(2) == 32


def test_a_stage_that_is_no_faster_for_more_workers_gives_them_back_and_waits() -> None:
    line = Line(2, {"a": Stage(0.0, 0.02, limit=100.0)})  # two can do a hundred

    sizes = []
    for _ in range(int(60 / LOOK_SECONDS)):
        line.look()
        sizes.append(line.sizes["a"])

    assert set(sizes) == {2, 4}
    assert sizes.count(4) < 0.1 * len(sizes)


def test_longer_jobs_that_come_in_the_middle_of_a_trial_cost_a_second() -> None:
    line = Line(2, {"a": Stage(0.0, 0.01)})
    while line.sizes["a"] < 16:
        line.look()

    line.stages = {"a": Stage(0.0, 0.05)}
    line.looks(4)
    assert line.sizes["a"] == 8  # as if the eight more had been of no use
    line.looks(int(HOLD_SECONDS / LOOK_SECONDS) + 12)

    assert line.sizes["a"] == 32


def test_an_upstream_stage_that_cannot_go_on_keeps_no_idle_workers() -> None:
    line = Line(8, {"a": Stage(0.001), "b": Stage(0.001, limit=500.0)})

    line.looks(20)

    assert line.sizes["a"] == 1


def full(workers: int, finished: int = 0, load: float = 0.0) -> Seen:
    return Seen(workers, 1.0, 1.0, load, finished)


def idle(workers: int) -> Seen:
    return Seen(workers, 0.0, 0.0, 0.0, 0)


def steps(shares: Shares, *seen: Seen, load: float = 0.0) -> list[int | None]:
    """Return what each of these looks at the stage ``a`` changes."""
    return [
        shares.look(number * LOOK_SECONDS, {"a": one}, load).get("a") for number, one in enumerate(seen, 1)
    ]


def begun(cores: float, *names: str) -> Shares:
    shares = Shares(cores)
    shares.start(names or ["a"], 0)
    return shares


def test_a_share_of_the_cores_to_begin_with_and_one_worker_at_the_least() -> None:
    assert Shares(16).start(["a", "b"], others=3) == {"a": 6, "b": 6}
    assert Shares(2).start(["a", "b", "c"], others=8) == {"a": 1, "b": 1, "c": 1}


def test_up_to_the_cores_no_job_has_to_be_finished_first() -> None:
    assert steps(begun(3), *[full(1)] * 2) == [None, 2]
    assert steps(begun(3), *[full(2)] * 2) == [None, 3]


def test_beyond_the_cores_a_stage_has_to_have_finished_jobs() -> None:
    assert steps(begun(2), *[full(2, 0)] * 10) == [None] * 10
    assert steps(begun(2), full(2, 0), full(2, 4), full(2, 8), full(2, 12), full(2, 16)) == [
        None,
        None,
        None,
        4,
        None,
    ]


def test_cores_that_are_in_use_are_not_given_twice() -> None:
    assert steps(begun(2), *[full(1, load=1.0)] * 3, load=2.0) == [None] * 3
    assert steps(begun(4), *[full(2, load=2.0)] * 2, load=3.5) == [None, 3]


def test_one_look_with_nothing_to_do_changes_nothing_and_a_second_of_it_does() -> None:
    lull = [idle(4)] * PATIENT_LOOKS

    assert set(steps(begun(4), idle(4), *lull[1:], full(4), *lull[1:])) == {None}
    assert steps(begun(4), idle(4), *lull)[-1] == 1


def test_as_many_workers_stay_as_were_needed_at_the_busiest_look() -> None:
    looks = [Seen(8, busy, 0.0, 0.0, 0) for busy in (0.1, 0.1, 0.35, *[0.1] * (PATIENT_LOOKS - 2))]

    assert steps(begun(8), *looks)[-1] == 4


def test_while_workers_start_nothing_is_judged() -> None:
    changing = Seen(1, 1.0, 1.0, 0.0, 0, changing=True)

    assert steps(begun(4), *[changing] * 5, full(2), full(2)) == [None] * 6 + [4]


def test_after_a_refusal_no_more_are_asked_for_until_later() -> None:
    shares = begun(4)
    assert steps(shares, full(1), full(1))[-1] == 2

    shares.hold("a", 0.5)

    looks = int(HOLD_SECONDS / LOOK_SECONDS)
    assert set(steps(shares, *[full(1)] * looks)) == {None}
    assert shares.look(HOLD_SECONDS + 1, {"a": full(1)}, 0.0) == {"a": 2}


def test_all_stages_together_have_a_limit() -> None:
    line = Line(2, {name: Stage(0.0, 0.02) for name in "abcd"})

    line.looks(60)

    assert sum(line.sizes.values()) <= most(2)


def test_a_gauge_weighs_by_time() -> None:
    gauge = Gauge(10.0)
    gauge.note(11.0, 1.0, waits=True)
    gauge.note(12.0, 0.5, waits=False)

    assert gauge.read(14.0) == (0.5, 0.25)
    assert gauge.read(15.0) == (0.5, 0.0)
