"""The ``thread`` backend: workers are threads, items travel by reference."""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import ClassVar

from jobq.backend import Page, Plan, Recipe, Waitable, blank_page, page_words
from jobq.backends.channel import Bell
from jobq.backends.child import attend
from jobq.errors import BrokenChannel, EndOfChannel
from jobq.wire import Answer, Bye, Codec, Hello, Order, ReferenceCodec, Said

#: Seconds that `ThreadBackend.close` waits for all idle threads together.
PATIENCE = 1.0


class ThreadPort:
    """The thread's end of its channel."""

    def __init__(self, page: Page) -> None:
        self.codec: Codec = ReferenceCodec()
        self.page = page
        self.bell = Bell()
        self.orders: SimpleQueue[Order | None] = SimpleQueue()
        self.said: deque[Said] = deque()
        self._abandoned = False
        self._greeted = False
        self._lock = threading.Lock()  # a descriptor that was closed must not be rung

    def receive(self) -> Order:
        """Return the next order, waiting for it; the first call says that the worker is up."""
        if not self._greeted:
            self._greeted = True
            self.say(Hello(os.getpid()))
        order = self.orders.get()
        if order is None or self._abandoned:
            raise EndOfChannel
        return order

    def send(self, answer: Answer) -> None:
        """Hand over one answer, unless nobody wants it any more."""
        self.say(answer)

    def say(self, said: Said) -> None:
        """Hand over one thing, unless nobody wants it any more."""
        with self._lock:
            if not self._abandoned:
                self.said.append(said)
                self.bell.ring()

    def abandon(self) -> None:
        """Let the driver hear nothing more, and the thread end as soon as it can."""
        with self._lock:
            self._abandoned = True
            self.said.clear()
            self.orders.put(None)


class ThreadWorker:
    """The driver's end of the channel to one thread."""

    pid: int | None = None

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name = name
        self.page: Page = [0] * page_words(recipe.lanes)
        blank_page(self.page)
        self._port = ThreadPort(self.page)
        self._waitables = (Waitable(self._port.bell.fd, selectors.EVENT_READ),)
        self._killed = False
        self._bye: Bye | None = None
        self._raised = False
        self.released = False
        self.thread = threading.Thread(target=attend, args=(recipe, self._port), name=name, daemon=True)
        self.thread.start()

    @property
    def waitables(self) -> tuple[Waitable, ...]:
        """What to wait for before calling `receive` again."""
        return self._waitables

    def send(self, order: Order) -> None:
        """Take *order* for delivery."""
        self._port.orders.put(order)

    def receive(self) -> Said | None:
        """Return the next thing the worker said; raise its end once."""
        if self._raised:
            return None
        port = self._port
        if not port.said:
            if self._killed:
                self._raised = True
                raise BrokenChannel("was abandoned")
            if self._bye is not None:
                self._raise_end(self._bye)
            port.bell.hush()
            if not port.said:
                return None
        said = port.said.popleft()
        if type(said) is Bye:
            self._bye = said
            port.bell.ring()  # the end is still to be told
        return said

    def close(self) -> None:
        """Tell the thread that no more orders come."""
        self._port.orders.put(None)

    def kill(self) -> None:
        """Abandon the thread: it ends when its job does, and nobody hears of it."""
        if self._bye is None:
            self._killed = True
            self._port.abandon()
            if not self._raised:
                self._port.bell.ring()

    def release(self) -> None:
        """Close the descriptor. Idempotent."""
        self.released = self._raised = True
        self._port.abandon()
        self._port.bell.close()

    def _raise_end(self, bye: Bye) -> None:
        self._raised = True
        self.thread.join(PATIENCE)
        if bye.problem is not None:
            raise BrokenChannel(bye.problem)
        raise EndOfChannel


class ThreadBackend:
    """Starts threads."""

    name: ClassVar[str] = "thread"
    own_thread: ClassVar[bool] = True

    @staticmethod
    def resolve(asked: str) -> str:  # noqa: ARG004  # there is nothing to choose
        """Return 'thread', whatever was asked for: no process is started."""
        return "thread"

    def __init__(self, plan: Plan) -> None:
        self.codec: Codec = ReferenceCodec()
        self.start_method = "thread"
        self._plan = plan
        self._workers: list[ThreadWorker] = []

    @property
    def at_work(self) -> bool:
        """Never: no user code runs in the driver's thread."""
        return False

    def start(self, name: str, recipe: str) -> ThreadWorker:
        """Start a thread for a recipe of the plan."""
        worker = ThreadWorker(name, self._plan.recipes[recipe])
        self._workers = [other for other in self._workers if not other.released or other.thread.is_alive()]
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        """Abandon every thread, and wait a little for those that have nothing to do. Idempotent."""
        for worker in self._workers:
            worker.release()
        patience = PATIENCE
        for worker in self._workers:
            begun = time.monotonic()
            worker.thread.join(max(patience, 0))
            patience -= time.monotonic() - begun
        self._workers = []
