"""The ``pipe`` backend: a `multiprocessing.Pipe` for each worker; its end of file is the end of work."""

from __future__ import annotations

import multiprocessing
from typing import ClassVar

from jobq.backends.channel import Outgoing
from jobq.backends.processes import ProcessBackend
from jobq.wire import Order, pack


class PipeInbox:
    """The driver's side of a pipe."""

    def __init__(self) -> None:
        self.stream = Outgoing(*multiprocessing.Pipe(duplex=False))

    def put(self, order: Order) -> None:
        """Write *order*, or what the pipe takes of it now."""
        self.stream.write(pack(order))

    def answered(self) -> None:
        """Do nothing: a pipe keeps no count."""

    def end(self) -> None:
        """Close the pipe once everything is written."""
        self.stream.end()

    def abandon(self) -> None:
        """Close the pipe now."""
        self.stream.abandon()


class PipeBackend(ProcessBackend):
    """Processes that read a pipe of their own."""

    name: ClassVar[str] = "pipe"

    def make_inbox(self) -> PipeInbox:
        """Return an empty pipe."""
        return PipeInbox()
