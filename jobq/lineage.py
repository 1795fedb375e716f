"""Which source items are still on their way, and what came of them: for whoever waits for one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobq.wire import Block, Failure, Part


@dataclass(slots=True)
class Fate:
    """
    What became of one source item so far.

    ``result`` is the result that settled last of all its descendants, ``failure`` the first dead one's (with
    its stage and job). ``open`` counts what of it is queued, in flight or held, ``ended`` what no longer is.
    """

    open: int = 0
    result: Block | None = None
    failure: tuple[Failure, str, Part | None] | None = None
    cancelled: bool = False
    ended: int = 0


class Lineage:
    """
    The fates of source items by number. ``settled`` is for the driver to empty.

    What comes of a batch descends from all of its items: they are a *family*, which has a number like a
    single item, below -1.
    """

    def __init__(self) -> None:
        self.settled: list[tuple[int, Fate]] = []
        self._fates: dict[int, Fate] = {}
        self._families: dict[int, tuple[int, ...]] = {}
        self._members: dict[int, int] = {}  # descendants of each family
        self._serial = -1

    def __len__(self) -> int:
        return len(self._fates)

    def begin(self, roots: Iterable[int]) -> None:
        """Follow source items from now on; each is held until `end` is called for it once."""
        for root in roots:
            self._fates[root] = Fate(open=1)

    def family(self, roots: Iterable[int]) -> int:
        """Return the number that stands for all of *roots*; `forget` it when its descendants were added."""
        each = tuple(dict.fromkeys(one for root in roots for one in self._each(root)))
        if len(each) == 1:
            return each[0]
        self._serial -= 1
        self._families[self._serial] = each
        self._members[self._serial] = 0
        return self._serial

    def forget(self, family: int) -> None:
        """Keep a family no longer that has no descendants."""
        if self._members.get(family) == 0:
            del self._families[family], self._members[family]

    def _each(self, root: int) -> tuple[int, ...]:
        return (root,) if root >= 0 else self._families[root]

    def add(self, roots: Iterable[int]) -> None:
        """Count one descendant more for each of *roots*."""
        for root in roots:
            if root < 0:
                self._members[root] += 1
            for one in self._each(root):
                self._fates[one].open += 1

    def gave(self, roots: Iterable[int], block: Block) -> None:
        """Note a block of results, one for each of *roots*."""
        for index, root in enumerate(roots):
            for one in self._each(root):
                self._fates[one].result = block.take(index, index + 1)

    def died(self, roots: Iterable[int], failure: Failure, stage: str, part: Part | None) -> None:
        """Note that a descendant of each of *roots* is dead."""
        for root in roots:
            for one in self._each(root):
                fate = self._fates[one]
                if fate.failure is None:
                    fate.failure = (failure, stage, part)

    def cancelled(self, roots: Iterable[int]) -> None:
        """Note that a descendant of each of *roots* never came to its end."""
        for root in roots:
            for one in self._each(root):
                self._fates[one].cancelled = True
        self.end(roots)

    def untouched(self, root: int) -> int | None:
        """Return how many jobs a source item has if none has ended yet."""
        fate = self._fates.get(root)
        return fate.open if fate is not None and not fate.ended else None

    def end(self, roots: Iterable[int], *, counts: bool = True) -> None:
        """
        Count one descendant less for each of *roots*: a source item without any is settled.

        Not *counts*: what ends is the hold of `begin`, which is no job.
        """
        for root in roots:
            for one in self._each(root):
                fate = self._fates[one]
                fate.open -= 1
                fate.ended += counts
                if not fate.open:
                    del self._fates[one]
                    self.settled.append((one, fate))
            if root < 0:
                self._members[root] -= 1
                self.forget(root)
