"""
The textbook programs on what `multiprocessing` has, item by item; ``raw-joinable`` is the baseline.

The calling process produces, unless results are wanted: then it collects them, and a process produces.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing import JoinableQueue, Pipe, Process, Queue, RawArray
from typing import Any, Protocol

from benchmarks.contestant import AT_ONCE, Contestant, Load, Work


class Channel(Protocol):
    """What one producer puts items into, and so many consumers share."""

    def put(self, item: Any) -> None:
        """Send *item* to one of the consumers."""

    def take(self, consumer: int) -> Iterator[Any]:
        """Yield the items for *consumer* until the end."""

    def end(self) -> None:
        """All items were taken (and done, if that can be known); no more come."""


class Joinable:
    """A JoinableQueue: at the end it is joined."""

    def __init__(self, consumers: int) -> None:
        self.queue: JoinableQueue[Any] = JoinableQueue()
        self.consumers = consumers

    def put(self, item: Any) -> None:
        """Put."""
        self.queue.put(item)

    def take(self, consumer: int) -> Iterator[Any]:  # noqa: ARG002  # they share one queue
        """Get; what was got is done when the next one is asked for."""
        queue = self.queue
        while (item := queue.get()) is not None:
            yield item
            queue.task_done()

    def end(self) -> None:
        """Join; then a None for each, instead of killing daemons, so that they can tell what they did."""
        self.queue.join()
        for _ in range(self.consumers):
            self.queue.put(None)


class Sentinel:
    """A Queue: at the end comes a None for each consumer."""

    def __init__(self, consumers: int) -> None:
        self.queue: Queue[Any] = Queue()
        self.consumers = consumers

    def put(self, item: Any) -> None:
        """Put."""
        self.queue.put(item)

    def take(self, consumer: int) -> Iterator[Any]:  # noqa: ARG002  # they share one queue
        """Get until None."""
        while (item := self.queue.get()) is not None:
            yield item

    def end(self) -> None:
        """Put the sentinels."""
        for _ in range(self.consumers):
            self.queue.put(None)


class Pipes:
    """A Pipe to each consumer, in turn. At the end comes a None: every copy of it would have to be closed."""

    def __init__(self, consumers: int) -> None:
        self.pipes = [Pipe(duplex=False) for _ in range(consumers)]
        self.next = 0

    def put(self, item: Any) -> None:
        """Send to the consumer whose turn it is."""
        self.pipes[self.next][1].send(item)
        self.next = (self.next + 1) % len(self.pipes)

    def take(self, consumer: int) -> Iterator[Any]:
        """Receive until None."""
        while (item := self.pipes[consumer][0].recv()) is not None:
            yield item

    def end(self) -> None:
        """Send the sentinels."""
        for _, sender in self.pipes:
            sender.send(None)


CHANNELS: dict[str, Callable[[int], Channel]] = {"joinable": Joinable, "sentinel": Sentinel, "pipe": Pipes}


def produce(load: Load, channel: Channel) -> None:
    """Put all items and the end."""
    for item in load.items(load.count):
        channel.put(item)
    channel.end()


def consume(work: Work, channel: Channel, number: int, done: Any) -> None:
    """Do all items, and leave behind how many."""
    count = 0
    for item in channel.take(number):
        work(item)
        count += 1
    done[number] = count


def answer(work: Work, channel: Channel, number: int, out: Queue[Any]) -> None:
    """Do all items, and put the results."""
    for item in channel.take(number):
        out.put(work(item))


def forward(work: Work, channel: Channel, following: Channel) -> None:
    """Do all items of one stage and pass the results on, then the end."""
    for item in channel.take(0):
        following.put(work(item))
    following.end()


class Raw(Contestant):
    """Processes around one kind of channel."""

    def __init__(self, kind: str) -> None:
        self.kind = CHANNELS[kind]

    def run(self, load: Load) -> list[Any] | int:
        """Start two consumers; produce here, or collect here."""
        channel = self.kind(2)
        if load.results:
            out: Queue[Any] = Queue()
            consumers = [Process(target=answer, args=(load.work, channel, n, out)) for n in range(2)]
            producer = Process(target=produce, args=(load, channel))
            with running(*consumers, producer):
                return [out.get() for _ in range(load.count)]
        done = RawArray("q", 2)
        with running(*(Process(target=consume, args=(load.work, channel, n, done)) for n in range(2))):
            produce(load, channel)
        return int(sum(done))

    @contextmanager
    def caller(self, work: Work) -> Iterator[Work]:
        """Put one, get one."""
        channel = self.kind(2)
        out: Queue[Any] = Queue()

        def call(item: Any) -> Any:
            channel.put(item)
            return out.get()

        with running(*(Process(target=answer, args=(work, channel, n, out)) for n in range(2))):
            yield call
            channel.end()

    def stages(self, load: Load, stages: int) -> int:
        """Make a channel before each stage."""
        channels = [self.kind(1) for _ in range(stages)]
        done = RawArray("q", 1)
        processes = [
            Process(target=forward, args=(load.work, channel, following))
            for channel, following in pairwise(channels)
        ]
        last = Process(target=consume, args=(load.work, channels[-1], 0, done))
        with running(*processes, last):
            produce(load, channels[0])
        return int(done[0])

    def waiting(self, load: Load) -> list[Any]:
        """One process, with as many threads as jobs at once, or an event loop."""
        channel = self.kind(AT_ONCE)
        out: Queue[Any] = Queue()
        target = answer_async if inspect.iscoroutinefunction(load.work) else answer_in_threads
        with running(Process(target=target, args=(load.work, channel, AT_ONCE, out))):
            produce(load, channel)
            return [out.get() for _ in range(load.count)]


def answer_in_threads(work: Work, channel: Channel, at_once: int, out: Queue[Any]) -> None:
    """Let each of so many threads be a consumer."""
    threads = [threading.Thread(target=answer, args=(work, channel, n, out)) for n in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def answer_async(work: Work, channel: Channel, at_once: int, out: Queue[Any]) -> None:
    """Let each of so many tasks be a consumer; what waits for the queue is a thread for each."""

    threads = ThreadPoolExecutor(at_once)

    async def consumer(number: int) -> None:
        items, loop = channel.take(number), asyncio.get_running_loop()
        while (item := await loop.run_in_executor(threads, next, items, None)) is not None:
            out.put(await work(item))

    async def consumers() -> None:
        await asyncio.gather(*(consumer(number) for number in range(at_once)))

    asyncio.run(consumers())


@contextmanager
def running(*processes: Process) -> Iterator[None]:
    """The processes run inside, and have ended after it."""
    for process in processes:
        process.start()
    yield
    for process in processes:
        process.join()


def make(kind: str) -> Contestant:
    """Return the textbook program on a channel of that kind."""
    return Raw(kind)
