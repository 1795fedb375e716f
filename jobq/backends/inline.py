"""The ``inline`` backend: jobs run in the thread that waits for them, so `breakpoint()` works."""

from __future__ import annotations

import os
import selectors
from collections import deque
from typing import ClassVar

from jobq.backend import Page, Plan, Recipe, Waitable, Work, blank_page, page_words
from jobq.backends.channel import Bell
from jobq.backends.child import describe_failure
from jobq.errors import BrokenChannel, EndOfChannel, Interrupted
from jobq.wire import Answer, Bye, Codec, Hello, Order, ReferenceCodec, Said


class InlinePort:
    """The work's end of its channel. Nobody receives from it: orders are handed to the work."""

    def __init__(self, page: Page) -> None:
        self.codec: Codec = ReferenceCodec()
        self.page = page
        self.said: deque[Said] = deque()

    def receive(self) -> Order:
        """Raise: inline work is called, it doesn't wait."""
        raise EndOfChannel

    def send(self, answer: Answer) -> None:
        """Keep one answer for the driver."""
        self.said.append(answer)


class InlineWorker:
    """Work that is done when the driver asks for answers."""

    pid: int | None = None

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name = name
        self.page: Page = [0] * page_words(recipe.lanes)
        blank_page(self.page)
        self._recipe = recipe
        self._port = InlinePort(self.page)
        self._work: Work | None = None
        self._orders: deque[Order] = deque()
        self._closing = False
        self._end: EndOfChannel | BrokenChannel | None = None
        self._raised = False
        self.released = False
        self.working = False
        self._bell = Bell()  # readable while there is something to do or to hear
        self._bell.ring()
        self._waitables = (Waitable(self._bell.fd, selectors.EVENT_READ),)

    @property
    def waitables(self) -> tuple[Waitable, ...]:
        """What to wait for before calling `receive` again."""
        return self._waitables

    def send(self, order: Order) -> None:
        """Keep *order* until the driver waits for answers."""
        self._orders.append(order)
        self._bell.ring()

    def receive(self) -> Said | None:
        """
        Return the next thing the work said, having worked for it if need be; raise its end once.

        A `KeyboardInterrupt` passes through: here it is the user's, not a job's.
        """
        said = self._port.said
        if not said and not self._raised:
            if self._end is not None:
                self._raised = True
                # A new one each time: what is raised holds the frames, and these hold us.
                raise BrokenChannel(*self._end.args) if isinstance(self._end, BrokenChannel) else EndOfChannel
            self._step()
        if said:
            return said.popleft()
        if self._end is None:
            self._bell.hush()
        return None

    def close(self) -> None:
        """End the work after the orders that were sent."""
        self._closing = True
        self._bell.ring()

    def kill(self) -> None:
        """Forget what has not been done."""
        if self._end is None:
            self._port.said.clear()
            self._end = BrokenChannel("was abandoned")
            self._bell.ring()

    def release(self) -> None:
        """Close the work, if it is open still, and the descriptor. Idempotent."""
        self.released = self._raised = True
        work, self._work = self._work, None
        try:
            if work is not None:
                work.close()
        finally:
            self._bell.close()

    def _step(self) -> None:
        """Do one thing: open, one order, or close."""
        self.working = True
        try:
            if self._work is None:
                self._work = self._recipe.open(self._port)
                self._port.said.append(Hello(os.getpid()))
            elif self._orders:
                self._work.run(self._orders.popleft())
            elif self._closing:
                work, self._work = self._work, None
                work.close()
                self._finish(None)
        except KeyboardInterrupt:
            raise
        except Interrupted:
            self._finish("was stopped")
        except BaseException as error:  # as in a process of its own: it can't work
            self._finish(describe_failure(error))
        finally:
            self.working = False

    def _finish(self, problem: str | None) -> None:
        self._port.said.append(Bye(problem))
        self._end = EndOfChannel() if problem is None else BrokenChannel(problem)


class InlineBackend:
    """Makes workers that borrow the driver's thread."""

    name: ClassVar[str] = "inline"
    own_thread: ClassVar[bool] = False

    @staticmethod
    def resolve(asked: str) -> str:  # noqa: ARG004  # there is nothing to choose
        """Return 'inline', whatever was asked for: no process is started."""
        return "inline"

    def __init__(self, plan: Plan) -> None:
        self.codec: Codec = ReferenceCodec()
        self.start_method = "inline"
        self._plan = plan
        self._workers: list[InlineWorker] = []

    @property
    def at_work(self) -> bool:
        """Whether a job is running in this thread: for signal handlers."""
        return any(worker.working for worker in self._workers)

    def start(self, name: str, recipe: str) -> InlineWorker:
        """Make a worker for a recipe of the plan; it opens when the driver first waits for it."""
        worker = InlineWorker(name, self._plan.recipes[recipe])
        self._workers = [other for other in self._workers if not other.released]
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        """Close what is open. Idempotent."""
        for worker in self._workers:
            worker.release()
        self._workers = []
