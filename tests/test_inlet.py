"""What is submitted waits in the inlet: no more of it than the driver has room for."""

from __future__ import annotations

import random

import pytest

from jobq.inlet import Entry, Inlet
from jobq.lineage import Fate
from jobq.wire import ReferenceCodec, References


class Full(Exception):
    """What `put` would wait for is not there."""


def refuse(_: object) -> None:
    raise Full


def ignore(_root: int, _fate: Fate) -> None:
    pass


def make(*stages: str) -> Inlet:
    inlet = Inlet(stages, ReferenceCodec(), ignore)
    inlet.pump = refuse
    return inlet


def taken(inlet: Inlet) -> list[object]:
    """Return the items that the driver finds."""
    found: list[object] = []
    for _, block, _ in inlet.take():
        assert isinstance(block, References)
        found += block.items
    return found


@pytest.mark.parametrize("seed", range(50))
def test_no_more_is_taken_in_than_there_was_room_for(seed: int) -> None:
    """The driver tells the room at any time, whatever it has told before, and whoever else took of it."""
    chance = random.Random(seed)
    inlet, takers = make("a"), (("a", None),)
    room = refused = 0  # as the driver knows it: what lies in the inlet takes of it

    for number in range(300):
        if chance.random() < 0.4:
            room = len(inlet._coming) + max(0, room - len(inlet._coming) + chance.randint(-4, 6))
            if chance.random() < 0.5:
                room -= len(taken(inlet))
            inlet.allow("a", room)
        try:
            inlet.put(Entry(takers, number, number))
        except Full:
            refused += 1
            inlet.allow("a", room)  # it was asked to
            if len(inlet._coming) < room:
                inlet.put(Entry(takers, number, number))
        assert len(inlet._coming) <= room

    assert 0 < refused < 300


def test_what_the_same_stages_take_is_one_block() -> None:
    inlet = make("a", "b")
    inlet.allow("a", 10)
    inlet.allow("b", 10)
    plain, keyed = (("a", None),), (("a", None), ("b", ("k",)))
    for number, takers in enumerate([plain, plain, keyed, (("a", None), ("b", ("l",))), plain]):
        inlet.put(Entry(takers, number, number))

    assert [(takers, len(roots)) for takers, _, roots in inlet.take()] == [
        (plain, 2),
        ((("a", None), ("b", ("k", "l"))), 2),
        (plain, 1),
    ]
    assert inlet.is_empty
