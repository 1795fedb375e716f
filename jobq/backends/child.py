"""
What a worker process does, from its first instruction to its last.

    set up signals and name ─ load the recipe ─ Hello ─ serve ─ Bye ─ flush ─ leave by os._exit
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import fcntl
import gc
import io
import multiprocessing
import multiprocessing.util
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any, NoReturn, Protocol

from jobq import faults
from jobq.arena import NOWHERE, Tenant
from jobq.backend import LIMIT, REGION, Port, Preload, Recipe, serve
from jobq.backends import descendants
from jobq.backends.channel import READ_SIZE, Incoming, SharedPage, unwritten, write_whole
from jobq.errors import EndOfChannel
from jobq.load import UNGUARDED, load_preload
from jobq.stage import CLOSING, OPENING
from jobq.wire import MAGIC, PREFIX, Answer, Buffer, Bye, Codec, Hello, Order, PickleCodec, Said, pack, unpack

#: A frame without header and body: no more orders come.
END_FRAME = PREFIX.pack(MAGIC, 0, 0)
#: Exit code of a worker whose job closed or replaced the channel's descriptors.
CHANNEL_GONE = 76
#: Seconds that processes which jobs left behind have to end when their worker does.
PATIENCE = 2.0
#: Linux's number; the `fcntl` module of 3.11 doesn't have the name.
F_SETSIG = 10


class Descriptor:
    """A descriptor that can be an argument of a process under forkserver and spawn."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _adopt, (reduction.DupFd(self.fd),)


def _adopt(duplicate: Any) -> Descriptor:
    fd = duplicate.detach()
    os.set_inheritable(fd, False)
    return Descriptor(fd)


@dataclass(frozen=True, slots=True)
class Ends:
    """The worker's ends of its channel, the arena, and the pipe that breaks when its driver dies."""

    inbox: Descriptor
    outbox: Descriptor
    page: Descriptor
    arena: Descriptor
    lifeline: Descriptor


class Speaker(Port, Protocol):
    """A port that can say more than answers."""

    def say(self, said: Said) -> None:
        """Hand over one thing, whole."""
        ...


class ChannelPort:
    """The worker's end of a channel of bytes."""

    def __init__(self, ends: Ends) -> None:
        self.memory = SharedPage(ends.page.fd)
        self.page = self.memory.words
        os.close(ends.page.fd)
        region = self.page[REGION]
        self.codec: Codec = PickleCodec(None if region == NOWHERE else Tenant(ends.arena.fd, region))
        self._incoming = Incoming(ends.inbox.fd)
        self._outbox = ends.outbox.fd
        self._pid = os.getpid()
        self._files = self._look()
        self._greeted = False

    def receive_recipe(self) -> Recipe:
        """Return the recipe that the driver sent ahead of the orders."""
        recipe: Recipe = pickle.loads(self._receive_frame()[PREFIX.size :])
        return recipe

    def receive(self) -> Order:
        """Return the next order, waiting for it; the first call says that the worker is up."""
        if not self._greeted:
            self._greeted = True
            self.say(Hello(self._pid))
        if faults.armed:
            faults.reach("before_recv")
        order = unpack(self._receive_frame())
        if faults.armed:
            faults.reach("after_recv")
        return order  # type: ignore[return-value]  # the driver sends orders only

    def send(self, answer: Answer) -> None:
        """Write one answer, whole."""
        self.say(answer)

    def say(self, said: Said) -> None:
        """Write one frame, whole, or end this process: after half a frame nothing can be said."""
        self._check()
        try:
            buffers = pack(said)
            if faults.armed:
                self._write_in_halves(buffers)
            else:
                write_whole(self._outbox, buffers)
        except BrokenPipeError:
            os._exit(1)  # the driver is gone: there is nobody to tell
        except BaseException:  # no memory; the flusher's thread would end alone, and what it took be lost
            traceback.print_exc()
            os._exit(1)

    def _write_in_halves(self, buffers: list[Buffer]) -> None:
        faults.reach("before_frame")
        half = sum(map(len, buffers)) // 2
        rest = unwritten(buffers, half)
        write_whole(self._outbox, [b"".join(buffers)[:half]])
        faults.reach("half_frame")
        write_whole(self._outbox, rest)
        faults.reach("after_frame")

    def _receive_frame(self) -> memoryview:
        incoming = self._incoming
        while (frame := incoming.frame()) is None:
            self._check()
            # With a fault set frames come in pieces, so that there is something between them.
            if not incoming.read(PREFIX.size // 2 if faults.armed else READ_SIZE):
                raise EndOfChannel
            if faults.armed:
                faults.reach("half_recv")
        if len(frame) == PREFIX.size:
            raise EndOfChannel
        return frame

    def _check(self) -> None:
        # A job may have forked and come back twice, or closed descriptors whose numbers now name the
        # user's own files. Neither may read or write here; both checks take about a microsecond.
        if os.getpid() != self._pid:
            os._exit(0)
        if self._look() != self._files:
            os._exit(CHANNEL_GONE)

    def _look(self) -> tuple[int, ...] | None:
        try:
            inbox, outbox = os.fstat(self._incoming.fd), os.fstat(self._outbox)
        except OSError:
            return None
        return inbox.st_dev, inbox.st_ino, outbox.st_dev, outbox.st_ino


def attend(recipe: Recipe, port: Speaker) -> None:
    """Serve until the driver wants no more, and say goodbye, with the reason if there is one."""
    problem: str | None = None
    try:
        serve(recipe, port)
    except BaseException as error:  # user code opened and closed things; what it raised is the last word
        problem = describe_failure(error)
    port.say(Bye(problem))


def main(
    ends: Ends,
    *,
    run: int,
    daemon: bool,
    stdin: str | None = None,
    preload: Preload | None = None,
    recipe: Recipe | None = None,
    inherited: Iterable[io.IOBase] = (),
) -> NoReturn:
    """
    Be a worker.

    A recipe that isn't given comes over the inbox, pickled. *inherited* are the driver's open files, of which
    the worker has copies. *run* is the number of the run by which what jobs leave is found.
    """
    try:
        lifeline = set_up(ends.lifeline.fd, daemon=daemon)
        descendants.mark(run)
        set_standard_input(stdin)
        port = ChannelPort(ends)
        tame_copies(lifeline, port)
        if recipe is None:
            try:
                if preload is not None:
                    load_preload(preload)
                recipe = port.receive_recipe()
            except EndOfChannel:
                leave()
            except BaseException as error:  # user code is imported
                port.say(Bye(describe_failure(error)))
                leave()
        attend(recipe, port)
        if faults.armed:
            faults.reach("before_exit")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    leave(inherited)


def tame_copies(lifeline: int, port: ChannelPort) -> None:
    """
    Let whatever is forked from this process begin no job of it, and end with the run.

    Else a job that comes back in both processes has all that follows in its chunk done twice, and the
    processes that a killed worker had started go on for ever.
    """
    file = os.fstat(lifeline)

    def be_a_copy() -> None:
        nonlocal lifeline
        with contextlib.suppress(ImportError, OSError):
            port.memory.part()
            port.page[LIMIT] = 0
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lifeline), file):  # else the job has closed it
                lifeline = die_with(lifeline)

    os.register_at_fork(after_in_child=be_a_copy)


def set_up(lifeline: int, *, daemon: bool) -> int:
    """Make this process a worker: deaf to Ctrl-C, dead when its driver is; return what `die_with` does."""
    held = die_with(lifeline)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError):
            faulthandler.enable(2)
    # The driver starts every worker as a daemon, since it ends them itself; what multiprocessing
    # allows *in* the worker is decided here.
    multiprocessing.current_process()._config["daemon"] = daemon  # type: ignore[attr-defined]
    return held


def set_standard_input(stdin: str | None) -> None:
    """
    Let `sys.stdin` be the program's (""), be empty (None), or raise *stdin* when it is read.

    Whoever doesn't have it doesn't hold it either: a program that a job starts would read it.
    """
    original = sys.__stdin__
    if original is None:  # there was none: the number may be any file's
        return
    if stdin == "":
        # multiprocessing has closed the object, not the descriptor.
        sys.stdin = open(0, encoding=original.encoding, errors=original.errors, closefd=False)  # noqa: SIM115
        return
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    if stdin is not None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(NoInput(stdin)))


class NoInput(io.RawIOBase):
    """A file that raises `OSError` with a given text when it is read."""

    def __init__(self, why: str) -> None:
        self._why = why

    def readable(self) -> bool:
        """Say that it can be read, so that reading says what is wrong."""
        return True

    def readinto(self, _: object) -> NoReturn:
        """Raise."""
        raise OSError(self._why)


def die_with(lifeline: int) -> int:
    """
    Have the kernel kill this process when the pipe *lifeline* loses its last writer; return its new number.

    Works while user code is busy, without a thread, whichever thread of the driver started us. Where the
    system can't do it, the worker sees the end of its inbox instead, after the job in hand.
    """
    own = hear_of(lifeline, signal.SIGKILL)
    if own == lifeline:
        return lifeline
    poll = select.poll()
    poll.register(own, select.POLLIN)
    if poll.poll(0):  # it broke before we listened
        os._exit(1)
    return own


def hear_of(lifeline: int, number: int) -> int:
    """Have the kernel signal this process when *lifeline* loses its last writer; return its new number."""
    try:
        # A signal's owner belongs to the open file, which siblings share: open our own.
        own = os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return lifeline
    with contextlib.suppress(OSError):
        fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(own, F_SETSIG, number)
        fcntl.fcntl(own, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        os.close(lifeline)
    return own


def leave(inherited: Iterable[io.IOBase] = ()) -> NoReturn:
    """
    End this process, leaving nothing in a buffer.

    Runs what the worker registered with `atexit`, flushes *inherited* files and those it opened itself, and
    waits for no thread.
    """
    for step in (atexit._run_exitfuncs, end_children, multiprocessing.util._exit_function):  # type: ignore[attr-defined]
        try:
            step()
        except BaseException:  # user code
            traceback.print_exc()
    flush((*open_files(), *inherited, sys.stdout, sys.stderr))
    os._exit(0)


def end_children() -> None:
    """
    Leave none of the processes that jobs started by `multiprocessing` and did not join.

    Daemons are told to end, as at the end of any program, others have a moment; then they are killed, since
    they would be waited for without limit.
    """
    multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]  # pools and managers end their own
    children = multiprocessing.active_children()
    for process in children:
        if process.daemon:
            process.terminate()
    deadline = time.monotonic() + PATIENCE
    for process in children:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


def open_files() -> list[io.IOBase]:
    """
    Return the files that are open in this process, those first that write through others.

    Objects that were frozen (what a worker has from its driver) are not listed.
    """
    # IOBase itself is an abstract class, whose subclass check is ten times as slow as its base's.
    base = io.IOBase.__bases__[0]
    files = [thing for thing in gc.get_objects() if issubclass(type(thing), base)]
    return sorted(files, key=lambda file: not isinstance(file, io.TextIOBase))


def flush(files: Iterable[Any]) -> None:
    """Write out what is in the buffers of *files*; what can't be written is left."""
    for file in files:
        with contextlib.suppress(BaseException):  # user classes; closed files
            file.flush()


def describe_failure(error: BaseException) -> str:
    """Return the end of a sentence that says why a worker can't work, and below it the traceback."""
    named = traceback.format_exception_only(error)
    # A syntax error is preceded by its place, a message may have several lines, and notes may follow.
    reason = next((line for line in named if not line.startswith(" ")), named[-1]).partition("\n")[0]
    place = _which_resource(error)
    return f"could not go on: {reason}{place}\n{''.join(traceback.format_exception(error)).rstrip()}"


def _which_resource(error: BaseException) -> str:
    notes = getattr(error, "__notes__", None)
    known = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    return next((f", {note}" for note in known if note.startswith((OPENING, CLOSING))), "")


def describe_exit(code: int) -> str:
    """Return an exit code, negative for a signal, as the end of a sentence."""
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    if code == CHANNEL_GONE:
        return f"exited with code {code} (a job closed descriptors that are not its own)"
    if code == UNGUARDED:
        return f'exited with code {code} (the program needs a main guard: if __name__ == "__main__":)'
    return f"exited with code {code}"
