"""
The ``joinable`` backend: a `JoinableQueue` for each worker, whose `join` is the end of work.

``put``, ``task_done`` and ``join`` are all called by the driver: a worker killed in ``task_done`` would hold
the queue's lock for ever. There is no feeder thread either; the driver writes, and never waits.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.queues import JoinableQueue
from typing import Any, ClassVar

from jobq.backends.channel import Outgoing
from jobq.backends.processes import ProcessBackend, semaphores
from jobq.wire import Order, pack


class JoinableInbox(JoinableQueue):  # type: ignore[type-arg]  # not subscriptable when run
    """The driver's side of a queue that counts the orders nobody has answered yet."""

    # Any: what JoinableQueue's attributes are, the stubs don't say.
    _cond: Any
    _unfinished_tasks: Any
    _reader: Any
    _writer: Any

    def __init__(self) -> None:
        with semaphores():
            # No worker takes these semaphores, so they need no name, however workers are started.
            super().__init__(ctx=multiprocessing.get_context("fork"))
        self.stream = Outgoing(self._reader, self._writer)
        self._ending = False

    def put(self, obj: Order, block: bool = True, timeout: float | None = None) -> None:  # noqa: ARG002
        """Count an order, and write it, or what the pipe takes of it now."""
        with self._cond:
            self._unfinished_tasks.release()
        self.stream.write(pack(obj))

    def answered(self) -> None:
        """Count one order as done."""
        self.task_done()
        self._end_when_done()

    def end(self) -> None:
        """Join once every order is answered, then close the queue."""
        self._ending = True
        self._end_when_done()

    def abandon(self) -> None:
        """Count what the worker has left undone as done, and close the queue."""
        while not self._all_done():
            self.task_done()
        self.join()
        self.stream.abandon()

    def _end_when_done(self) -> None:
        if self._ending and self._all_done():
            self.join()
            self.stream.end()

    def _all_done(self) -> bool:
        zero: bool = self._unfinished_tasks._semlock._is_zero()
        return zero


class JoinableBackend(ProcessBackend):
    """Daemon processes that read a joinable queue of their own."""

    name: ClassVar[str] = "joinable"

    def make_inbox(self) -> JoinableInbox:
        """Return an empty queue."""
        return JoinableInbox()
