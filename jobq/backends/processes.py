"""
Workers that are processes: what `pipe`, `sentinel` and `joinable` share, which is all but the inbox.

A worker's death is told by the kernel (its parent's `waitpid`, or a pidfd), never by the end of a pipe, which
a grandchild may hold open. After it, whatever the worker had written whole still counts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import selectors
import shutil
import sys
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import ClassVar, Protocol

from jobq import faults
from jobq.arena import Arena
from jobq.backend import REGION, Plan, Waitable, blank_page, page_words
from jobq.backends import child
from jobq.backends.channel import Incoming, Outgoing, SharedPage, close, make_page_file, readable, widen
from jobq.backends.descendants import Attendant, new_number
from jobq.backends.launcher import Launcher
from jobq.backends.memory import OutOfMemory, events_file
from jobq.backends.nursery import Nursery, NurseryLost, Stranded, threads_run
from jobq.errors import BackendUnavailable, BrokenChannel, EndOfChannel, SpoiltChannel
from jobq.wire import MAGIC, PREFIX, Answer, Bye, Codec, Hello, Order, PickleCodec, Said, unpack

START_METHODS = ("auto", "fork", "forkserver", "spawn")
#: How often to try to start one worker while somebody kills what forks it.
TRIES = 3
#: How many of the first workers are begun with before they are asked for: with more, all would begin late.
AHEAD = 8
#: What the driver holds of a worker: both ends of the inbox, one of the outbox, the page, pidfd and epitaph.
DESCRIPTORS_PER_WORKER = 6
#: What a run holds besides, and what starting a worker takes for a moment.
SPARE_DESCRIPTORS = 16
#: Seconds between the end of a dying process's outbox and its own, at most.
DYING = 1.0
CLOSED_BY_A_JOB = "closed its channel (a job closed descriptors that are not its own)"


class Inbox(Protocol):
    """The driver's side of one worker's inbox; no method waits."""

    stream: Outgoing

    def put(self, order: Order) -> None:
        """Take an order for delivery."""
        ...

    def answered(self) -> None:
        """Note that an order was answered for good."""
        ...

    def end(self) -> None:
        """Tell the worker, after all it was sent, that no more comes."""
        ...

    def abandon(self) -> None:
        """Settle what the worker can't any more, and close. Idempotent."""
        ...


class Process(Protocol):
    """One worker process. ``fd`` is readable when it has ended."""

    pid: int
    fd: int

    def ended(self) -> str | None:
        """Return how it ended ("was killed by SIGKILL"), or None while it runs."""
        ...

    def kill(self) -> None:
        """Kill it if it still runs."""
        ...

    def release(self) -> None:
        """Let nothing remain of it. Idempotent."""
        ...

    def forget(self) -> None:
        """Close the descriptors only. Idempotent."""
        ...


class ProcessWorker:
    """The driver's end of the channel to one process."""

    def __init__(
        self,
        name: str,
        channel: Channel,
        process: Process,
        *,
        arena: Arena,
        out_of_memory: OutOfMemory,
    ) -> None:
        self.name = name
        self.pid: int | None = process.pid
        self.page = channel.page.words
        self._inbox = channel.inbox
        self._stream = channel.inbox.stream
        self._outbox = Incoming(channel.outbox)
        self._memory = channel.page
        self._process = process
        self._out_of_memory = out_of_memory
        self._arena = arena
        self._region = channel.page.words[REGION]
        self._place = partial(arena.lease, self._region)
        self._closing = False
        self._killed = False  # by us
        self._silent = False  # nothing more can be read
        self._raised = False
        self._up = False
        self._bye: Bye | None = None
        self._problem: str | None = None
        self.released = False
        self._listening: tuple[Waitable, ...] = (
            Waitable(channel.outbox, selectors.EVENT_READ),
            Waitable(process.fd, selectors.EVENT_READ),
        )
        self._writing: tuple[Waitable, ...] = (
            *self._listening,
            Waitable(self._stream.fd, selectors.EVENT_WRITE),
        )

    @property
    def waitables(self) -> tuple[Waitable, ...]:
        """What to wait for before calling `receive` again."""
        return self._writing if self._stream.pending else self._listening

    def send(self, order: Order) -> None:
        """Take *order* for delivery."""
        if faults.armed:
            faults.reach("before_put")
        self._inbox.put(order)

    def receive(self) -> Said | None:
        """Return the next whole thing the worker said; raise its end once."""
        if self._stream.pending:
            self._stream.flush()
        said = self._hear()
        if said is None and not self._outbox.dry and not self._raised:
            how = self._process.ended()
            if how is not None:
                # What it wrote between our last look and its death still counts.
                said = self._hear()
                if said is None:
                    self._raise_end(how)
        if said is None:
            self._outbox.dry = False  # whoever asks again has waited for more
        return said

    def close(self) -> None:
        """Tell the worker that no more orders come."""
        if not self._closing:
            self._closing = True
            self._inbox.end()

    def kill(self) -> None:
        """Kill the process; `receive` raises its end."""
        self._killed = True
        self._process.kill()

    def release(self) -> None:
        """Close the descriptors, unmap the page, and give the region back. Idempotent."""
        self._raised = True
        self._inbox.abandon()
        self._process.release()
        if not self.released:
            self._arena.vacate(self._region)  # which may be another's already, the next time
        self.released = True
        self._memory.release()
        self.forget()

    def forget(self) -> None:
        """Close the descriptors only: this is a copy of the driver's process. Idempotent."""
        self._raised = True
        self._silence()
        self._stream.abandon()
        fd, self._outbox.fd = self._outbox.fd, -1
        close(fd)
        self._process.forget()

    def _hear(self) -> Said | None:
        if self._silent:
            return None
        outbox = self._outbox
        try:
            while (frame := outbox.frame()) is None:
                if outbox.dry:
                    return None
                if not outbox.read():
                    self._fall_silent()
                    return None
            said = unpack(frame, self._place)
        except BlockingIOError:
            return None
        except BrokenChannel as error:
            self._break(str(error))
            return None
        except Exception as error:  # bytes that no worker of ours writes
            self._break(f"said what can't be read ({type(error).__name__}: {error})")
            return None
        self._note(said)  # type: ignore[arg-type]  # the worker sends no orders
        return said  # type: ignore[return-value]

    def _note(self, said: Said) -> None:
        if type(said) is Answer:
            if said.final:
                if faults.armed:
                    faults.reach("before_task_done")
                self._inbox.answered()
        elif type(said) is Bye:
            self._bye = said
        elif type(said) is Hello:
            self._up = True

    def _fall_silent(self) -> None:
        self._silence()
        # It is dying, or a job has closed its descriptors: then nobody will ever hear of it again.
        if self._bye is None and not readable(self._process.fd, DYING):
            self._break(CLOSED_BY_A_JOB)

    def _break(self, problem: str) -> None:
        self._problem = problem
        self._silence()
        self._process.kill()

    def _silence(self) -> None:
        if not self._silent:
            self._silent = True
            self._outbox.dry = False
            self._listening = self._listening[1:]
            self._writing = self._writing[1:]

    def _raise_end(self, how: str) -> None:
        self._raised = True
        self._inbox.abandon()
        if self._problem is not None:
            raise SpoiltChannel(self._problem)
        if how == child.describe_exit(child.CHANNEL_GONE):
            raise SpoiltChannel(how)
        if self._bye is None:
            raise BrokenChannel(how + self._describe_moment(how))
        if self._bye.problem is not None:
            raise BrokenChannel(self._bye.problem)
        if not self._closing:
            raise BrokenChannel(f"{how} without having been told to end")
        raise EndOfChannel

    def _describe_moment(self, how: str) -> str:
        if how == "was killed by SIGKILL" and not self._killed and self._out_of_memory.explains_a_death():
            return " (out of memory?)"
        if not self._up:
            return " before it was ready"
        return " in the middle of its work" if how.startswith("exited") else ""


class Channel:
    """The descriptors of one worker's channel: the driver's ends, and those that go to the process."""

    def __init__(self, inbox: Inbox, lanes: int, arena: Arena) -> None:
        self.inbox = inbox
        self._arena = arena
        with contextlib.ExitStack() as undo:
            undo.callback(inbox.abandon)
            self.outbox, theirs = os.pipe()
            undo.callback(os.close, self.outbox)
            undo.callback(os.close, theirs)
            memory = make_page_file(page_words(lanes))
            undo.callback(os.close, memory)
            self.page = SharedPage(memory)
            undo.callback(self.page.release)
            blank_page(self.page.words)
            self.page.words[REGION] = self._region = arena.let()
            undo.callback(arena.vacate, self._region)
            os.set_blocking(self.outbox, False)
            widen(self.outbox)
            # Copies of what this process goes on to use, so that all of these are closed alike.
            reader = os.dup(inbox.stream.reader.fileno())
            undo.callback(os.close, reader)
            self.given = [reader, theirs, memory, os.dup(arena.fd)]
            undo.pop_all()

    def hand_over(self) -> None:
        """Close what the process owns by now. Idempotent."""
        given, self.given = self.given, []
        for fd in given:
            os.close(fd)

    def abandon(self) -> None:
        """Close all of it: there is no process."""
        self.hand_over()
        os.close(self.outbox)
        self.inbox.abandon()
        self._arena.vacate(self._region)
        self.page.release()

    def forget(self) -> None:
        """Close the driver's ends only: this is a copy of its process."""
        os.close(self.outbox)
        self.inbox.stream.abandon()
        self.page.release()


class ProcessBackend:
    """Starts worker processes. A subclass names itself and makes inboxes."""

    name: ClassVar[str]
    own_thread: ClassVar[bool] = True

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._method = choose_start_method(plan.start_method)
        self._workers: list[ProcessWorker] = []
        make_sure_of_descriptors(max(plan.workers, len(plan.recipes)))
        self._out_of_memory = OutOfMemory(events_file())
        self._attendant = Attendant(new_number())
        self._nursery: Nursery | None = None
        self._launcher: Launcher | None = None
        self._ahead: dict[str, Channel] = {}  # of workers that are being forked, and not asked for yet
        self._arena = Arena()
        codec = PickleCodec(self._arena)
        self.codec: Codec = codec
        self._sockets = codec.sockets
        _forget_in_children(self)
        try:
            if self._method == "fork":
                self._nursery = self._fork_nursery()
            else:
                self._launcher = Launcher(plan, self._method, self._attendant)
        except BaseException:
            self.close()
            raise

    def _fork_nursery(self) -> Nursery:
        """Fork what forks the workers, and have it begin with the first of them."""
        try:
            first: dict[str, tuple[str, list[int]]] = {}
            for name, recipe in islice(self._plan.first, AHEAD):
                channel = self._ahead[name] = self._open(recipe)
                first[name] = (recipe, channel.given)
            nursery = Nursery(self._plan, self._attendant, first)
        except OSError:  # too few descriptors for all at once; one at a time there may be enough
            self._abandon_first()
            return Nursery(self._plan, self._attendant)
        for channel in self._ahead.values():
            channel.hand_over()
        return nursery

    def _abandon_first(self) -> None:
        while self._ahead:
            self._ahead.popitem()[1].abandon()

    @staticmethod
    def resolve(asked: str) -> str:
        """Return the start method that is meant by *asked* here and now."""
        return choose_start_method(asked)

    @property
    def start_method(self) -> str:
        """How workers are started in fact."""
        return self._method

    @abstractmethod
    def make_inbox(self) -> Inbox:
        """Return an empty inbox."""

    @property
    def at_work(self) -> bool:
        """Never: no user code runs in the driver's thread."""
        return False

    def start(self, name: str, recipe: str) -> ProcessWorker:
        """
        Start a worker; don't wait for its `Hello`.

        Raises `OSError` where the system refuses a process or a descriptor: trying later may help.
        """
        channel = self._ahead.pop(name, None)
        if channel is not None:
            assert self._nursery is not None
            with contextlib.suppress(NurseryLost):
                return self._worker(name, channel, partial(self._nursery.take, name))
        for _ in range(TRIES):
            # Each time with a new channel: a worker that was forked all the same holds the old one.
            self._mend()
            channel = self._open(recipe)
            with contextlib.suppress(NurseryLost):
                return self._worker(name, channel, partial(self._launch, name, recipe, channel))
        raise BackendUnavailable(f"the process that forks workers was killed {TRIES} times in a row")

    def _open(self, recipe: str) -> Channel:
        return Channel(self.make_inbox(), self._plan.recipes[recipe].lanes, self._arena)

    def _worker(self, name: str, channel: Channel, launch: Callable[[], Process]) -> ProcessWorker:
        """Return the worker at the other end of *channel*, once it is known that there is a process."""
        try:
            process = launch()
        except BaseException:
            channel.abandon()
            raise
        channel.hand_over()
        worker = ProcessWorker(name, channel, process, arena=self._arena, out_of_memory=self._out_of_memory)
        self._workers = [other for other in self._workers if not other.released]
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        """Kill what still runs and leave nothing behind. Idempotent."""
        self._attendant.close()
        for worker in self._workers:
            worker.kill()
        if self._nursery is not None:
            self._nursery.close()
        for worker in self._workers:
            worker.release()
        self._workers = []
        if self._launcher is not None or (self._nursery is not None and self._nursery.ever_lost):
            self._attendant.finish()  # else the keeper has
        self._abandon_first()
        if self._launcher is not None:
            self._launcher.close()
        self._arena.close()
        self._sockets.close()

    def _launch(self, name: str, recipe: str, channel: Channel) -> Process:
        if self._launcher is None:
            assert self._nursery is not None
            return self._nursery.start(name, recipe, channel.given)
        process = self._launcher.start(name, recipe, channel.given)
        pickled = self._launcher.recipes[recipe]
        channel.inbox.stream.write([PREFIX.pack(MAGIC, 0, len(pickled)), pickled])
        return process

    def _mend(self) -> None:
        """Have somebody who starts processes, if the last one was lost."""
        if self._nursery is not None and self._launcher is None:
            try:
                self._nursery.mend()
            except Stranded as stranded:
                self._launcher = self._fork_server(stranded)

    def _fork_server(self, stranded: Stranded) -> Launcher:
        """Return what starts processes from now on; raises *stranded* if recipes can't be sent there."""
        try:
            return Launcher(self._plan, "forkserver", self._attendant)
        except BackendUnavailable as error:
            raise stranded from error

    def forget(self) -> None:
        """Close the descriptors only: this is a copy of the driver's process. Idempotent."""
        for worker in self._workers:
            worker.forget()
        if self._nursery is not None:
            self._nursery.forget()
        if self._launcher is not None:
            self._launcher.forget()
        for channel in self._ahead.values():
            channel.forget()
        self._arena.forget()
        self._workers, self._ahead = [], {}


_backends: weakref.WeakSet[ProcessBackend] = weakref.WeakSet()
_hooked = False


def _forget_in_children(backend: ProcessBackend) -> None:
    """
    Have whatever this process forks from now on close *backend*'s descriptors.

    A child that kept the writing end of an inbox would keep its worker from seeing the end of work, and
    one that kept the lifeline would keep the workers alive.
    """
    global _hooked  # noqa: PLW0603  # the hook can't be taken back, so it is set once
    _backends.add(backend)
    if not _hooked:
        _hooked = True
        os.register_at_fork(after_in_child=_forget_all)


def _forget_all() -> None:
    for backend in list(_backends):
        backend.forget()
    _backends.clear()


def choose_start_method(asked: str) -> str:
    """
    Return how workers will be started: *asked*, or for "auto" fork where that is safe, else forkserver.

    Forking is unsafe while other threads run, whether or not Python started them: a lock that one of
    them holds stays locked in the child.
    """
    if asked not in START_METHODS:
        raise BackendUnavailable(f"there is no start method {asked!r}; known are {', '.join(START_METHODS)}.")
    if asked != "auto":
        return asked
    return "fork" if sys.platform == "linux" and not threads_run() else "forkserver"


def make_sure_of_descriptors(workers: int) -> None:
    """Raise `BackendUnavailable` where this process may not have the descriptors for so many workers."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = workers * DESCRIPTORS_PER_WORKER + SPARE_DESCRIPTORS
    with contextlib.suppress(OSError):  # no /proc: starting them will tell
        free = limit - len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        if free < needed:
            raise BackendUnavailable(
                f"{workers} workers need {needed} descriptors, and {free} are free: this process may have "
                f"{limit} (ulimit -n). Raise the limit, or use fewer workers."
            )


@contextlib.contextmanager
def semaphores() -> Iterator[None]:
    """Say what is missing where the system has no semaphores to give."""
    try:
        yield
    except (ImportError, OSError) as error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # of these there may be more later
        raise BackendUnavailable(
            f"this backend's queues need POSIX semaphores: {error}. {_describe_shm()} "
            "The backend 'pipe' needs none."
        ) from error


def _describe_shm() -> str:
    try:
        total, _, free = shutil.disk_usage("/dev/shm")
    except OSError:
        return "Is /dev/shm missing?"
    return f"They live in /dev/shm, where {free:,} of {total:,} bytes are free."
