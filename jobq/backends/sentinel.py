"""The ``sentinel`` backend: a `multiprocessing.Queue` for each worker; a last, empty frame ends its work."""

from __future__ import annotations

import multiprocessing
from multiprocessing.queues import Queue
from typing import Any, ClassVar

from jobq.backends.channel import Outgoing
from jobq.backends.child import END_FRAME
from jobq.backends.processes import ProcessBackend, semaphores
from jobq.wire import Order, pack


class SentinelInbox(Queue):  # type: ignore[type-arg]  # not subscriptable when run
    """The driver's side of a queue without a feeder thread: the driver writes, and never waits."""

    _reader: Any  # Any: the stubs don't say what a Queue's attributes are
    _writer: Any

    def __init__(self) -> None:
        with semaphores():
            # No worker takes these semaphores, so they need no name, however workers are started.
            super().__init__(ctx=multiprocessing.get_context("fork"))
        self.stream = Outgoing(self._reader, self._writer)

    def put(self, obj: Order, block: bool = True, timeout: float | None = None) -> None:  # noqa: ARG002
        """Write an order, or what the pipe takes of it now."""
        self.stream.write(pack(obj))

    def answered(self) -> None:
        """Do nothing: the queue keeps no count."""

    def end(self) -> None:
        """Send the sentinel after everything else."""
        self.stream.write([END_FRAME])

    def abandon(self) -> None:
        """Close the queue now."""
        self.stream.abandon()


class SentinelBackend(ProcessBackend):
    """Processes that read a queue of their own until its sentinel."""

    name: ClassVar[str] = "sentinel"

    def make_inbox(self) -> SentinelInbox:
        """Return an empty queue."""
        return SentinelInbox()
