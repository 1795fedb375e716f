"""
What is possible at all: two processes and a bare pipe, best batches; shared memory for what is large.

It validates nothing, keeps no books, survives nothing. Where the question is scheduling it is the bare
greedy schedule: two processes that share nothing but the next job's number.
"""

from __future__ import annotations

import asyncio
import inspect
import marshal
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice, pairwise
from mmap import mmap
from multiprocessing import Pipe, Process, Value
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any

from benchmarks.contestant import AT_ONCE, Contestant, Load, Work

#: Slots of shared memory that are used in turn, and their size.
SLOTS, SLOT = 4, 8 << 20


class Limit(Contestant):
    """A caller and, forked from it, a worker."""

    chunks = MappingProxyType({"W1": 16_384, "W2": 128, "W6": 16_384, "W8": 16_384})

    def run(self, load: Load) -> list[Any] | int:
        """Choose the program that is best for *load*."""
        if load.workload.startswith(("W3", "W10")):
            return self._greedy(load)
        if load.workload.startswith("W4"):
            return self._shared(load)
        return self._batches(load)

    def _batches(self, load: Load) -> list[Any] | int:
        """Send pickled lists; two ahead of the answers if these fit into the pipe, lest both ends wait."""
        results: list[Any] = []
        done = 0
        items, chunk = load.items(load.count), self.chunk(load)
        with forked(do_batches, load.work, load.results) as pipe:
            ahead, most = 0, 2 if not load.results or chunk <= 128 else 1
            while True:
                while ahead < most and (batch := list(islice(items, chunk))):
                    pipe.send_bytes(pickle.dumps(batch, -1))
                    ahead += 1
                if not ahead:
                    break
                answer = pickle.loads(pipe.recv_bytes())
                ahead -= 1
                if load.results:
                    results += answer
                else:
                    done += answer
        return results if load.results else done

    def _greedy(self, load: Load) -> list[Any]:
        """Fork two that take the next number and do that item."""
        following = Value("q", 0)
        items = list(load.items(load.count))
        with (
            forked(do_next, load.work, items, following) as one,
            forked(do_next, load.work, items, following) as other,
        ):
            return [result for pipe in (one, other) for result in pickle.loads(pipe.recv_bytes())]

    def _shared(self, load: Load) -> list[Any]:
        """Copy into shared memory, there look at it and copy it out."""
        memory = mmap(-1, SLOTS * SLOT)
        results = []
        with forked(do_slots, load.work, memory) as pipe:
            for number, item in enumerate(load.items(load.count)):
                if number >= SLOTS:  # the slot is free once its item is done
                    results.append(marshal.loads(pipe.recv_bytes()))
                buffers: list[pickle.PickleBuffer] = []
                head = pickle.dumps(
                    pickle.PickleBuffer(item) if isinstance(item, bytes) else item,
                    5,
                    buffer_callback=buffers.append,
                )
                [raw] = (buffer.raw() for buffer in buffers)
                start = number % SLOTS * SLOT
                memory[start : start + raw.nbytes] = raw
                pipe.send_bytes(marshal.dumps((head, start, raw.nbytes)))
            while len(results) < load.count:
                results.append(marshal.loads(pipe.recv_bytes()))
        return results

    @contextmanager
    def caller(self, work: Work) -> Iterator[Work]:
        """Send one, receive one."""
        with forked(do_batches, work, True) as pipe:

            def call(item: Any) -> Any:
                pipe.send_bytes(pickle.dumps([item], -1))
                return pickle.loads(pipe.recv_bytes())[0]

            yield call

    def stages(self, load: Load, stages: int) -> int:
        """Send pickled lists from stage to stage; the last one sends how many there were."""
        items, chunk = load.items(load.count), self.chunk(load)
        pipes = [Pipe(duplex=False) for _ in range(stages + 1)]
        processes = [
            Process(target=do_stage, args=(load.work, receiver, sender, number == stages - 1))
            for number, ((receiver, _), (_, sender)) in enumerate(pairwise(pipes))
        ]
        for process in processes:
            process.start()
        while batch := list(islice(items, chunk)):
            pipes[0][1].send_bytes(pickle.dumps(batch, -1))
        pipes[0][1].send_bytes(pickle.dumps([]))
        done = pickle.loads(pipes[-1][0].recv_bytes())
        for process in processes:
            process.join()
        return int(done)

    def waiting(self, load: Load) -> list[Any]:
        """One process with threads or tasks, and all items at hand."""
        with forked(do_waiting, load.work, list(load.items(load.count)), AT_ONCE) as pipe:
            return list(pickle.loads(pipe.recv_bytes()))


def do_batches(pipe: Connection, work: Work, results: bool) -> None:
    """Answer each list with its results, or their number, until the end."""
    while True:
        try:
            batch = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        if results:
            answer: Any = [work(item) for item in batch]
        else:
            for item in batch:
                work(item)
            answer = len(batch)
        pipe.send_bytes(pickle.dumps(answer, -1))


def do_next(pipe: Connection, work: Work, items: list[Any], following: Any) -> None:
    """Do the next item until there is none; answer with all results."""
    results = []
    while True:
        with following.get_lock():
            number = following.value
            following.value += 1
        if number >= len(items):
            break
        results.append(work(items[number]))
    pipe.send_bytes(pickle.dumps(results))


def do_slots(pipe: Connection, work: Work, memory: mmap) -> None:
    """Do what lies in the slots; the item is a copy, so it outlives its slot."""
    while True:
        try:
            head, start, size = marshal.loads(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send_bytes(marshal.dumps(work(pickle.loads(head, buffers=[memory[start : start + size]]))))


def do_stage(work: Work, receiver: Connection, sender: Connection, last: bool) -> None:
    """Pass each list's results on, until the empty one; the last stage only counts."""
    done = 0
    while batch := pickle.loads(receiver.recv_bytes()):
        outputs = [work(item) for item in batch]
        done += len(outputs)
        if not last:
            sender.send_bytes(pickle.dumps(outputs, -1))
    sender.send_bytes(pickle.dumps(done if last else []))


def do_waiting(pipe: Connection, work: Work, items: list[Any], at_once: int) -> None:
    """Do all items, so many at once, in tasks or threads; answer with all results."""
    if not inspect.iscoroutinefunction(work):
        with ThreadPoolExecutor(at_once) as threads:
            pipe.send_bytes(pickle.dumps(list(threads.map(work, items))))
        return

    async def all_items() -> list[Any]:
        left = iter(items)

        async def some() -> list[Any]:
            return [await work(item) for item in left]

        parts = await asyncio.gather(*(some() for _ in range(at_once)))
        return [result for part in parts for result in part]

    pipe.send_bytes(pickle.dumps(asyncio.run(all_items())))


@contextmanager
def forked(function: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A child runs *function* with its end of a pipe; it has ended afterwards."""
    ours, theirs = Pipe()
    child = os.fork()
    if not child:
        ours.close()
        try:
            function(theirs, *arguments)
        finally:
            os._exit(0)
    theirs.close()
    yield ours
    ours.close()
    os.waitpid(child, 0)


def make(_: str) -> Contestant:
    """Return the limit."""
    return Limit()
