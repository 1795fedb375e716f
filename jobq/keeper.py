"""
The keeper: the worker that opens a run's run-scoped resources, and gives all others access to them.

Started by the backend before the others, closed after them; gets no orders. Its death ends the run. Where
workers are processes it is one too, and one thread of it does all that is done to the objects, from opening
to closing.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobq.annotations import read_signature
from jobq.backend import Port
from jobq.backends.channel import Bell
from jobq.listener import Listener
from jobq.locks import ThreadPlace, here, inside, join, joined, keeper_address
from jobq.shared import Board
from jobq.wire import Order
from jobq.work import Resources, ResourceUse, at_once

if TYPE_CHECKING:
    from jobq.backend import Work
    from jobq.observe.log import LogSettings

#: The keeper's recipe: no stage's, since those end with their number.
RECIPE = "keeper"


@dataclass(frozen=True)
class KeeperRecipe:
    """Everything that the keeper needs to know. Implements `jobq.backend.Recipe`."""

    place: str
    uses: tuple[ResourceUse, ...]
    log: LogSettings | None = None

    @property
    def lanes(self) -> int:
        """One: it has no jobs."""
        return 1

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.place, tuple((use.resource, use.values) for use in self.uses), self.log)

    def open(self, port: Port) -> Work:  # noqa: ARG002  # it says nothing
        """Open the resources, and let others use them from now on."""
        if self.log is not None:
            from jobq.observe.log import configure

            configure(self.log)
        join(self.place)
        with inside(self.place):
            place = here("a run-scoped resource")
            work: Work = (
                _InThisThread(place, self.uses)
                if isinstance(place, ThreadPlace)
                else _InItsThread(self.place, self.uses)
            )
        return joined(work, self.place, bool)


def _rebuild(place: str, resources: tuple[Any, ...], log: LogSettings | None) -> KeeperRecipe:
    uses = (ResourceUse(resource, read_signature(resource), values) for resource, values in resources)
    return KeeperRecipe(place, tuple(uses), log)


class _Keeping:
    """What both kinds share: no orders come."""

    def run(self, order: Order) -> None:
        raise NotImplementedError(f"the keeper takes no orders, got {order!r}")


class _InThisThread(_Keeping):
    """The resources of a run whose workers are threads: these use them directly, one at a time."""

    def __init__(self, place: ThreadPlace, uses: tuple[ResourceUse, ...]) -> None:
        self._place = place
        self._resources = Resources(uses, keeping=True)
        try:
            place.perform = Board(at_once(self._resources.values())).perform
        except BaseException:
            at_once(self._resources.close())
            raise

    def close(self) -> None:
        self._place.perform = None
        at_once(self._resources.close())


class _InItsThread(_Keeping):
    """The resources of a run whose workers are processes: these reach them by connections."""

    def __init__(self, place: str, uses: tuple[ResourceUse, ...]) -> None:
        self._place = place
        self._resources = Resources(uses, keeping=True)
        self._bell = Bell()
        self._said: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="jobq-keeper", daemon=True)
        self._thread.start()
        self._hear()

    def close(self) -> None:
        self._closing = True
        self._bell.ring()
        self._thread.join()
        self._bell.close()
        self._hear()

    def _hear(self) -> None:
        """Return when the thread is through with the step, raising what it raised."""
        error = self._said.get()
        if error is not None:
            raise error

    def _work(self) -> None:
        error: BaseException | None = None
        with inside(self._place):
            try:
                try:
                    self._serve(Board(at_once(self._resources.values())))
                finally:
                    at_once(self._resources.close())
            except BaseException as raised:  # user code
                error = raised
        self._said.put(error)

    def _serve(self, board: Board) -> None:
        address = keeper_address(self._place)
        listener = Listener(address, lambda peer, request: peer.send(board.answer(request)))
        with contextlib.closing(listener):
            listener.also(self._bell.fd)
            self._said.put(None)  # it can be reached
            try:
                while not self._closing:
                    listener.serve(None)
            except BaseException:  # nobody would hear of it but by our end
                traceback.print_exc()
                os._exit(1)
