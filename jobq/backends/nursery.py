"""
A process without threads that forks the workers, so that the driver never forks while threads run.

    driver ── start (recipe, descriptors) | kill ──> nursery ── fork ──> worker
    driver <── pid ──────────────────────────────── nursery
    driver <══ epitaph: how the worker ended ══════ nursery (one pipe per worker)

It is forked when the backend is made, and so holds the plan's recipes as they are, closures included.
It runs no user code. It ends with the driver, and its workers with it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import gc
import io
import marshal
import os
import select
import signal
import socket
import stat
import struct
import sys
import traceback
import warnings
from multiprocessing.context import ForkProcess
from typing import Any, NoReturn

from jobq.backend import Plan
from jobq.backends import child
from jobq.backends.channel import close

LENGTH = struct.Struct("<I")
STARTED = struct.Struct("<ii")  # pid, errno
STATUS = struct.Struct("<i")
#: Seconds to wait for a process that does nothing but fork.
PATIENCE = 30
#: Seconds to wait for killed processes before leaving them to the system.
REAPING = 5


class NurseryLost(Exception):
    """The process that forks workers is gone, and its workers with it."""


class Nursery:
    """The driver's end of a nursery."""

    def __init__(self, plan: Plan) -> None:
        self._requests, theirs = socket.socketpair()
        broken, self._lifeline = os.pipe()
        # Flushed now, else every worker repeats what is in the buffers.
        files = child.open_files() if _files_are_open() else []
        child.flush((*files, sys.stdout, sys.stderr))
        driver = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns of any thread, also a C library's: whether to fork was decided before.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                self._requests.close()
                os.close(self._lifeline)
                _Keeper(plan, theirs, broken, driver, files).run()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        os.close(broken)
        self._requests.settimeout(PATIENCE)

    def start(self, name: str, recipe: str, descriptors: list[int]) -> Forked:
        """
        Fork a worker that owns *descriptors* (inbox, outbox, page).

        Raises `OSError` if the system has no more processes, memory or descriptors, and
        `NurseryLost` if somebody killed the nursery.
        """
        epitaph, theirs = os.pipe()
        try:
            request = marshal.dumps((name, recipe))
            socket.send_fds(self._requests, [LENGTH.pack(len(request)), request], [*descriptors, theirs])
            reply = _receive(self._requests, STARTED.size)
            pid, number = STARTED.unpack(reply)
            if number:
                raise OSError(number, f"can't start worker {name}: {os.strerror(number)}")
        except BaseException as error:
            os.close(epitaph)
            if isinstance(error, ConnectionError | EOFError | TimeoutError):
                raise NurseryLost from error
            raise
        finally:
            os.close(theirs)
        return Forked(self, pid, epitaph)

    def kill(self, pid: int) -> None:
        """Kill a worker; one that has ended is left in peace."""
        request = marshal.dumps(pid)
        with contextlib.suppress(OSError):  # no nursery, no workers
            self._requests.sendall(LENGTH.pack(len(request)) + request)

    def close(self) -> None:
        """Kill the workers and the nursery, and wait until they are gone. Idempotent."""
        if self.pid == 0:
            return
        self._requests.settimeout(REAPING)
        try:
            self._requests.shutdown(socket.SHUT_WR)
            while self._requests.recv(4096):  # until it has ended
                pass
        except OSError:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # the embedding program may reap what it didn't start
            os.waitpid(self.pid, 0)
        self.pid = 0
        self.forget()

    def forget(self) -> None:
        """Close the descriptors only. Idempotent."""
        self._requests.close()
        lifeline, self._lifeline = self._lifeline, -1
        close(lifeline)


class Forked:
    """A worker process, as its driver sees it. ``fd`` is readable when it has ended."""

    def __init__(self, nursery: Nursery, pid: int, epitaph: int) -> None:
        self.pid = pid
        self.fd = epitaph
        self._nursery = nursery
        self._how: str | None = None
        os.set_blocking(epitaph, False)

    def ended(self) -> str | None:
        """Return how the process ended, or None while it runs."""
        if self._how is None:
            try:
                status = os.read(self.fd, STATUS.size)
            except BlockingIOError:
                return None
            self._how = (
                child.describe_exit(STATUS.unpack(status)[0])
                if status
                else "was lost with the process that forks the workers"
            )
        return self._how

    def kill(self) -> None:
        """Kill the process if it still runs."""
        if self.fd >= 0 and self.ended() is None:  # its number may be another worker's by now
            self._nursery.kill(self.pid)

    def release(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self.fd = self.fd, -1
        close(fd)

    forget = release


class _Keeper:
    """The nursery itself, in its own process."""

    def __init__(
        self, plan: Plan, requests: socket.socket, lifeline: int, driver: int, files: list[io.IOBase]
    ) -> None:
        self._plan = plan
        self._files = files
        self._requests = requests
        self._epitaphs: dict[int, int] = {}
        # Signals of the terminal or of a process group are the driver's to react to.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGCHLD})
        child.die_with(lifeline)
        if os.getppid() != driver:
            os._exit(1)
        self._worker_lifeline, self._life = os.pipe()
        self._bell, bell = os.pipe()
        for fd in (self._bell, bell):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
        self._inner = (requests.fileno(), self._life, self._bell, bell)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        atexit._clear()  # the driver's hooks are not ours to run
        gc.freeze()  # what a worker opens can be told from what it inherits, and pages stay shared

    def run(self) -> NoReturn:
        poll = select.poll()
        for fd in (self._requests.fileno(), self._bell):
            poll.register(fd, select.POLLIN)
        with contextlib.suppress(OSError, AttributeError):
            poll.register(os.pidfd_open(os.getppid()), select.POLLIN)
        watched = {self._requests.fileno(), self._bell}
        try:
            while True:
                ready = {fd for fd, _ in poll.poll()}
                if ready - watched:
                    break
                if self._bell in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._bell, 4096)
                    self._reap()
                if self._requests.fileno() in ready:
                    self._serve()
        except (EOFError, ConnectionError):
            pass
        self._end()

    def _serve(self) -> None:
        length, fds, _, _ = socket.recv_fds(self._requests, LENGTH.size, 4)
        if not length:
            raise EOFError
        length += _receive(self._requests, LENGTH.size - len(length)) if len(length) < LENGTH.size else b""
        request: Any = marshal.loads(_receive(self._requests, LENGTH.unpack(length)[0]))
        if isinstance(request, int):
            if request in self._epitaphs:
                os.kill(request, signal.SIGKILL)
            return
        name, recipe = request
        pid, number = self._fork(name, recipe, fds)
        self._requests.sendall(STARTED.pack(pid, number))

    def _fork(self, name: str, recipe: str, fds: list[int]) -> tuple[int, int]:
        try:
            if len(fds) < 4:
                return 0, errno.EMFILE  # the kernel drops what doesn't fit into our table
            pid = os.fork()
            if pid == 0:
                self._become_worker(name, recipe, fds)
        except OSError as error:
            return 0, error.errno or errno.EAGAIN
        else:
            self._epitaphs[pid] = fds.pop()
            return pid, 0
        finally:
            for fd in fds:
                os.close(fd)

    def _become_worker(self, name: str, recipe: str, fds: list[int]) -> NoReturn:
        try:
            for fd in (*self._inner, fds[3], *self._epitaphs.values()):
                os.close(fd)
            self._requests.detach()
            ends = child.Ends(*map(child.Descriptor, (*fds[:3], self._worker_lifeline)))
            options = {
                "daemon": self._plan.daemon.get(recipe, True),
                "recipe": self._plan.recipes[recipe],
                "inherited": self._files,
            }
            process = ForkProcess(target=child.main, args=(ends,), kwargs=options, name=name, daemon=True)
            process._bootstrap()  # type: ignore[attr-defined]  # makes it multiprocessing's current process
        finally:
            os._exit(1)

    def _reap(self, *, wait: bool = False) -> None:
        while self._epitaphs:
            try:
                pid, status = os.waitpid(-1, 0 if wait else os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            epitaph = self._epitaphs.pop(pid, None)
            if epitaph is not None:
                with contextlib.suppress(BrokenPipeError):
                    os.write(epitaph, STATUS.pack(os.waitstatus_to_exitcode(status)))
                os.close(epitaph)

    def _end(self) -> NoReturn:
        for pid in self._epitaphs:
            os.kill(pid, signal.SIGKILL)
        self._reap(wait=True)
        os._exit(0)


def _receive(connection: socket.socket, count: int) -> bytes:
    """Return exactly *count* bytes."""
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _files_are_open() -> bool:
    """Return whether this process may have something in a buffer, besides its standard streams."""
    try:
        return any(map(_is_written, (int(name) for name in os.listdir("/proc/self/fd"))))  # noqa: PTH208
    except OSError:
        return True


def _is_written(fd: int) -> bool:
    try:
        mode = os.fstat(fd).st_mode
        writes = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except OSError:  # the listing's own
        return False
    return fd > 2 and writes and (stat.S_ISREG(mode) or stat.S_ISCHR(mode))
