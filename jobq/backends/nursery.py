"""
A process without threads that forks the workers, so that the driver never forks while threads run.

    driver ── start (recipe, descriptors) ──> keeper ── fork ──> worker
    driver <── pid, pidfd ─────────────────── keeper ── fork ──> spare keeper, which waits: a moment later
    driver <══ epitaph: how a worker ended ══ keeper (one pipe per worker)
    driver ══ lifeline: breaks when the driver dies ══> workers, which die then

The first keeper is forked when the backend is made, and so holds the plan's recipes as they are, closures
included. It runs no user code. Nothing hangs on its life: its workers die with the driver and not with it,
their deaths are seen by pidfd, and the spare, which never had threads either, takes its place.

What a worker leaves behind, programs that its jobs have started, its keeper ends (`descendants`), after the
driver's death too: then that is the last thing it does.
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
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from multiprocessing.context import ForkProcess
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias

from jobq.backend import Plan
from jobq.backends import child
from jobq.backends.channel import OUR_MEMORY, close, readable
from jobq.backends.descendants import LEEWAY, Attendant, Leftovers
from jobq.errors import BackendUnavailable

LENGTH = struct.Struct("<I")
STARTED = struct.Struct("<iii")  # pid, errno, whether a pidfd comes along
GREETING = struct.Struct("<i")  # the pid of a spare
STATUS = struct.Struct("<i")
#: A keeper's last word: nothing of its workers is left.
FAREWELL = b"!"
#: Descriptors that come with a request for a worker: inbox, outbox, page, arena, and the epitaph's.
GIVEN = 5
#: Seconds to wait for a process that does nothing but fork.
PATIENCE = 30
#: Seconds to wait for killed processes before leaving them to the system.
REAPING = 5
LOST = "ended, how is not known"
#: Seconds to wait for the keeper to say how a worker ended that has ended for certain.
MOURNING = 1
#: A request that is no worker's: fork a spare keeper, which is reached by the socket that comes along.
SPARE = ""
#: Seconds until a spare is forked: a short run does without, and a longer one has its workers first.
SPARE_DELAY = 0.05
#: A worker that is to be forked: its name, its recipe's, and the descriptors that are given to it.
Birth: TypeAlias = tuple[str, str, list[int]]
#: What the keepers don't listen to. To make it takes a tenth of a millisecond.
BLOCKED = signal.valid_signals() - {signal.SIGCHLD}


class NurseryLost(Exception):
    """The keeper was killed before it answered (it may have forked); the next start takes another."""


class Stranded(BackendUnavailable):
    """No process is left that could fork, and this one, where threads run, must not."""


class Nursery:
    """The driver's end: the keeper that forks workers now, and the one that would take its place."""

    def __init__(
        self,
        plan: Plan,
        attendant: Attendant,
        first: Mapping[str, tuple[str, list[int]]] = MappingProxyType({}),
    ) -> None:
        """
        Fork the keeper, which begins with the workers *first*: by name, their recipes and descriptors.

        The descriptors remain the caller's to close. The workers are to be taken.
        """
        self._plan = plan
        self._attendant = attendant
        self._broken, self._lifeline = os.pipe()
        self._spare: _Contact | None = None
        self._lost = False
        self.ever_lost = False  # then there may be something that no keeper sees to
        self._begun: dict[str, int] = {}  # epitaphs of workers that we haven't heard of yet, in their order
        self._taken: dict[str, Forked | OSError] = {}  # what we have heard
        try:
            with contextlib.ExitStack() as given:
                births: list[Birth] = []
                for name, (recipe, descriptors) in first.items():
                    self._begun[name], theirs = os.pipe()
                    given.callback(os.close, theirs)
                    births.append((name, recipe, [*descriptors, theirs]))
                self._keeper = self._fork_keeper(births)
        except BaseException:
            self._forget_begun()
            os.close(self._broken)
            os.close(self._lifeline)
            raise
        self._have_a_spare()

    @property
    def pid(self) -> int:
        """The process that forks workers now."""
        return self._keeper.pid

    @property
    def spare_pid(self) -> int | None:
        """The process that would take its place."""
        return None if self._spare is None else self._spare.meet()

    def mend(self) -> None:
        """
        Replace a keeper that was lost; raises `Stranded` if there can't be another one.

        Called while no channel is open that is to be a worker's: a keeper forked then would hold it open.
        """
        if self._lost:
            self._replace_keeper()

    def start(self, name: str, recipe: str, descriptors: list[int]) -> Forked:
        """
        Fork a worker that owns *descriptors* (inbox, outbox, page, arena).

        Raises `OSError` if the system has no more processes, memory or descriptors, `NurseryLost` if somebody
        killed the keeper (`mend`, and try again with a new channel: a worker may hold this one).
        """
        while self._begun:
            self._hear_of_first()
        epitaph, theirs = os.pipe()
        try:
            with self._noticing_a_loss():
                pid, pidfd = self._keeper.fork(name, recipe, [*descriptors, theirs])
        except BaseException:
            os.close(epitaph)
            raise
        finally:
            os.close(theirs)
        self._have_a_spare()
        return Forked(pid, pidfd, epitaph, self._attendant)

    def take(self, name: str) -> Forked:
        """Return one of the first workers, waiting until it is forked; raises as `start` does."""
        while name in self._begun:
            self._hear_of_first()
        taken = self._taken.pop(name, None)
        if taken is None:
            raise NurseryLost
        if isinstance(taken, OSError):
            raise taken
        return taken

    def _hear_of_first(self) -> None:
        """Wait for what became of the next of the first workers."""
        name = next(iter(self._begun))
        try:
            with self._noticing_a_loss():
                pid, pidfd = self._keeper.forked(name)
        except NurseryLost:
            self._forget_begun()
            raise
        except OSError as error:
            os.close(self._begun.pop(name))
            self._taken[name] = error
        else:
            self._taken[name] = Forked(pid, pidfd, self._begun.pop(name), self._attendant)

    @contextlib.contextmanager
    def _noticing_a_loss(self) -> Iterator[None]:
        try:
            yield
        except (ConnectionError, EOFError, TimeoutError) as error:
            self._lost = self.ever_lost = True
            raise NurseryLost from error

    def _forget_begun(self) -> None:
        begun, self._begun = self._begun, {}
        for epitaph in begun.values():
            os.close(epitaph)

    def close(self) -> None:
        """Kill the keepers, their workers and what these left; wait until all is gone. Idempotent."""
        spare, self._spare = self._spare, None
        contacts = [contact for contact in (spare, self._keeper) if contact is not None]
        for contact in contacts:  # all before we wait for one: the parent waits for the spare
            contact.hang_up()
        if spare is not None:
            spare.end()
        self.ever_lost |= not self._keeper.end()
        self.forget()

    def forget(self) -> None:
        """Close the descriptors only. Idempotent."""
        self._keeper.forget()
        if self._spare is not None:
            self._spare.forget()
        self._forget_begun()
        taken, self._taken = self._taken, {}
        for worker in taken.values():
            if isinstance(worker, Forked):
                worker.forget()
        fds = (self._broken, self._lifeline)
        self._broken = self._lifeline = -1
        for fd in fds:
            close(fd)

    def _replace_keeper(self) -> None:
        lost, spare, self._spare = self._keeper, self._spare, None
        lost.bury()
        if spare is not None and (spare.meet() is None or spare.lost):
            spare.forget()
            spare = None
        if spare is not None:
            self._keeper = spare
        elif threads_run():
            raise Stranded(
                "both processes that fork workers were killed, and forking another is not safe "
                "while threads run; start_method='forkserver' can't lose them"
            )
        else:
            self._keeper = self._fork_keeper(first=False)
        self._lost = False
        self._have_a_spare()

    def _have_a_spare(self) -> None:
        """Ask for a spare if none lives. Where there can't be one now, the next start asks again."""
        if self._spare is not None:
            if not self._spare.lost:
                return
            self._spare.forget()
            self._spare = None
        with contextlib.suppress(OSError):
            self._spare = self._keeper.fork_spare()

    def _fork_keeper(self, births: Sequence[Birth] = (), *, first: bool = True) -> _Contact:
        ours, theirs = socket.socketpair()
        # Flushed now, else every worker repeats what is in the buffers.
        files = child.open_files() if _files_are_open() else []
        child.flush((*files, sys.stdout, sys.stderr))
        driver, lifeline = os.getpid(), os.dup(self._broken)
        with warnings.catch_warnings():
            # Python 3.12 warns of any thread, also a C library's: whether to fork was decided before.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                self._forget_begun()
                close(self._broken)
                close(self._lifeline)
                keeper = _Keeper(self._plan, self._attendant.run, lifeline, driver, files, first=first)
                keeper.run(theirs, births)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        os.close(lifeline)
        return _Contact(ours, pid)


class _Contact:
    """The driver's connection to one keeper."""

    def __init__(self, connection: socket.socket, pid: int = 0) -> None:
        self._connection = connection
        self.pid = pid
        connection.settimeout(PATIENCE)

    @property
    def lost(self) -> bool:
        """Whether the keeper is gone."""
        try:
            while readable(self._connection.fileno(), 0):
                if self.pid or self.meet() is None:
                    return not self._connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True
        return False

    def meet(self) -> int | None:
        """Return the number of a spare, waiting until it is there; None if it never will be."""
        if not self.pid:
            try:
                (self.pid,) = GREETING.unpack(_receive(self._connection, GREETING.size))
            except (OSError, EOFError):
                self.forget()
                return None
        return self.pid

    def fork(self, name: str, recipe: str, descriptors: list[int]) -> tuple[int, int]:
        """Have a worker forked; return its number and a pidfd, -1 where the system has none."""
        kept_free = os.dup(descriptors[0])  # room for the pidfd
        try:
            self._request((name, recipe), descriptors)
        finally:
            os.close(kept_free)
        return self.forked(name)

    def forked(self, name: str) -> tuple[int, int]:
        """Return number and pidfd of the worker *name*, the first of those whose keeper hasn't said them."""
        data, fds, _, _ = socket.recv_fds(self._connection, STARTED.size, 1)
        if not data:
            raise EOFError
        data += _receive(self._connection, STARTED.size - len(data))
        pid, number, comes = STARTED.unpack(data)
        if number:
            raise OSError(number, f"can't start worker {name}: {os.strerror(number)}")
        if comes and not fds:  # another thread took the room; the worker ends with its channel
            raise OSError(errno.EMFILE, f"can't start worker {name}: {os.strerror(errno.EMFILE)}")
        return pid, fds[0] if fds else -1

    def fork_spare(self) -> _Contact:
        """Have a spare keeper forked in a moment; doesn't wait for it."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._request(SPARE, [theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        return _Contact(ours)

    def hang_up(self) -> None:
        """Let the keeper kill its workers and end. Idempotent."""
        with contextlib.suppress(OSError):  # it has hung up before
            self._connection.shutdown(socket.SHUT_WR)

    def end(self) -> bool:
        """
        Wait until the keeper, which was hung up, has ended; return whether it has seen to its workers.

        Idempotent.
        """
        if self._connection.fileno() < 0:
            return True
        self._connection.settimeout(REAPING)
        said = b""
        try:
            while data := self._connection.recv(4096):  # until it has ended
                said = data
        except OSError:
            self.bury()
        self._reap()
        self.forget()
        return said.endswith(FAREWELL)

    def bury(self) -> None:
        """Kill the keeper if it lives: one that doesn't answer is as good as dead."""
        if self.meet() is not None:
            pid = self.pid
            with contextlib.suppress(OSError):
                if not self.lost:  # else its number may be another's by now
                    os.kill(pid, signal.SIGKILL)
        self._reap()
        self.forget()

    def forget(self) -> None:
        """Close the descriptor only. Idempotent."""
        self._connection.close()

    def _reap(self) -> None:
        # A spare is no child of ours, and the embedding program may reap what it didn't start.
        pid, self.pid = self.pid, 0
        if pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def _request(self, request: str | tuple[str, str], descriptors: list[int]) -> None:
        data = marshal.dumps(request)
        socket.send_fds(self._connection, [LENGTH.pack(len(data)), data], descriptors)


class Forked:
    """A worker process, as its driver sees it. ``fd`` is readable when it has ended."""

    def __init__(self, pid: int, pidfd: int, epitaph: int, attendant: Attendant) -> None:
        self.pid = pid
        self._attendant = attendant
        self.fd = epitaph if pidfd < 0 else pidfd
        self._pidfd = pidfd
        self._epitaph = epitaph
        self._how: str | None = None
        os.set_blocking(epitaph, False)

    def ended(self) -> str | None:
        """Return how the process ended, or None while it runs."""
        if self._how is None and readable(self.fd, 0):
            # The kernel tells a death a moment before the keeper does; one that was killed tells nothing.
            readable(self._epitaph, MOURNING)
            try:
                status = os.read(self._epitaph, STATUS.size)
            except BlockingIOError:  # the keeper is suspended
                status = b""
            if status:
                self._how = child.describe_exit(STATUS.unpack(status)[0])
            elif self._pidfd >= 0:
                self._how = LOST
            else:  # without pidfd nobody would see it end; it can't answer, and ends with the driver
                self._how = "was lost with the process that forks the workers"
        return self._how

    def kill(self) -> None:
        """Kill the process if it still runs."""
        if self.fd < 0 or self.ended() is not None:
            return
        with contextlib.suppress(OSError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            else:
                os.kill(self.pid, signal.SIGKILL)

    def release(self) -> None:
        """Close the descriptors, when the process has gone. Idempotent."""
        if self.fd >= 0 and self.ended() is None:
            self.kill()
            readable(self.fd, REAPING)
        elif self.fd >= 0 and self._how == LOST:
            self._attendant.kill(self.pid)  # its keeper, which would do so, was killed
        self.forget()

    def forget(self) -> None:
        """Close the descriptors only. Idempotent."""
        fds = {self._pidfd, self._epitaph}
        self.fd = self._pidfd = self._epitaph = -1
        for fd in fds:
            close(fd)


class _Keeper:
    """The process that forks, from inside. A spare is a fork of it."""

    def __init__(
        self, plan: Plan, run: int, lifeline: int, driver: int, files: list[io.IOBase], *, first: bool
    ) -> None:
        self._plan = plan
        self._leftovers = Leftovers(run)
        self._first = first  # else there may be something that was left under another keeper
        self._chief = -1  # of a spare: the pipe by which it hears that its keeper has seen to all, or died
        self._heirs: list[int] = []  # the other ends of such pipes, to our own spares
        self._files = files
        self._lifeline = lifeline
        self._epitaphs: dict[int, int] = {}
        self._unborn: list[list[int]] = []  # what is given to workers that are still to be forked
        self._spares: list[int] = []  # sockets for those that are still to be forked
        self._spare_at = 0.0
        # Signals of the terminal or of a process group are the driver's to react to.
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
        self._driver = -1
        with contextlib.suppress(OSError, AttributeError):
            self._driver = os.pidfd_open(driver)
        if os.getppid() != driver:  # it has died meanwhile
            os._exit(1)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        atexit._clear()  # the driver's hooks are not ours to run
        gc.freeze()  # what a worker opens can be told from what it inherits, and pages stay shared

    def run(self, requests: socket.socket, births: Sequence[Birth] = ()) -> NoReturn:
        """Fork the first workers, and serve the driver's requests until it wants no more or is gone."""
        self._requests = requests
        # Its end is seen below, and there is something to do then: we need only run.
        child.hear_of(os.dup(self._lifeline), signal.SIGCONT)
        self._bell, bell = os.pipe()
        for fd in (self._bell, bell):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
        self._own = (requests.fileno(), self._bell, bell)
        poll = select.poll()
        for fd in (requests.fileno(), self._bell, self._driver):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        try:
            self._unborn = [fds for _, _, fds in births]
            born = [self._fork_worker(name, recipe, self._unborn.pop(0)) for name, recipe, _ in births]
            for pid, number in born:  # afterwards, so that none begins later for it
                self._tell_of_birth(pid, number)
            while True:
                ready = {fd for fd, _ in poll.poll(self._patience())}
                if self._driver in ready:
                    break
                if self._bell in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._bell, 4096)
                    self._reap()
                if requests.fileno() in ready:
                    self._serve()
                if self._spares and time.monotonic() >= self._spare_at:
                    self._fork_spares()
                if self._leftovers.due is not None and time.monotonic() >= self._leftovers.due:
                    self._leftovers.look()
        except (EOFError, ConnectionError):
            pass
        self._end()

    def _patience(self) -> float | None:
        """Return the milliseconds until there is something to do that nobody asks for; None: there is not."""
        due = [self._spare_at] if self._spares else []
        if self._leftovers.due is not None:
            due.append(self._leftovers.due)
        return 1000 * max(0.0, min(due) - time.monotonic()) if due else None

    def _serve(self) -> None:
        length, fds, _, _ = socket.recv_fds(self._requests, LENGTH.size, GIVEN)
        if not length:
            raise EOFError
        length += _receive(self._requests, LENGTH.size - len(length))
        request: Any = marshal.loads(_receive(self._requests, LENGTH.unpack(length)[0]))
        if request == SPARE:
            self._spares += fds  # none, where our table was full: the driver sees the socket close
            self._spare_at = time.monotonic() + SPARE_DELAY
            return
        name, recipe = request
        self._tell_of_birth(*self._fork_worker(name, recipe, fds))

    def _tell_of_birth(self, pid: int, number: int) -> None:
        """Give the driver the worker, or the number of the error why there is none."""
        with contextlib.ExitStack() as given:
            pidfds = []
            if pid:
                with contextlib.suppress(OSError, AttributeError):
                    # Opened here: the number can't be another's as long as we have not reaped.
                    pidfds.append(os.pidfd_open(pid))
                    given.callback(os.close, pidfds[0])
            socket.send_fds(self._requests, [STARTED.pack(pid, number, len(pidfds))], pidfds)

    def _fork_worker(self, name: str, recipe: str, fds: list[int]) -> tuple[int, int]:
        try:
            if len(fds) < GIVEN:
                return 0, errno.EMFILE  # the kernel drops what doesn't fit into our table
            pid = os.fork()
            if pid == 0:
                self._become_worker(name, recipe, fds)
        except OSError as error:
            return 0, error.errno or errno.EAGAIN
        else:
            self._epitaphs[pid] = fds.pop()
            self._leftovers.keep(pid)
            return pid, 0
        finally:
            for fd in fds:
                os.close(fd)

    def _become_worker(self, name: str, recipe: str, fds: list[int]) -> NoReturn:
        try:
            self._shed()
            os.close(fds[-1])
            close(self._driver)
            ends = child.Ends(*map(child.Descriptor, (*fds[:-1], self._lifeline)))
            options = {
                "run": self._leftovers.run,
                "daemon": self._plan.daemon.get(recipe, True),
                "stdin": self._plan.stdin.get(recipe),
                "recipe": self._plan.recipes[recipe],
                "inherited": self._files,
            }
            process = ForkProcess(target=child.main, args=(ends,), kwargs=options, name=name, daemon=True)
            process._bootstrap()  # type: ignore[attr-defined]  # makes it multiprocessing's current process
        finally:
            os._exit(1)

    def _fork_spares(self) -> None:
        while self._spares:
            with contextlib.suppress(OSError):  # the driver sees the socket close, and asks again
                chief, heir = os.pipe()
                self._heirs.append(heir)
                try:
                    if os.fork() == 0:
                        self._become_spare(self._spares.pop(0), chief)
                finally:
                    os.close(chief)
            os.close(self._spares.pop(0))

    def _become_spare(self, fd: int, chief: int) -> NoReturn:
        try:
            self._shed()
            self._epitaphs, self._spares, self._heirs = {}, [], []
            self._leftovers, self._first, self._chief = Leftovers(self._leftovers.run), False, chief
            requests = socket.socket(fileno=fd)
            with contextlib.suppress(OSError):  # the driver is gone, which `run` sees
                requests.sendall(GREETING.pack(os.getpid()))
            self.run(requests)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _shed(self) -> None:
        """Close, in a fork, what is this keeper's alone: who holds it would hide its death."""
        for fd in (*self._own, *self._epitaphs.values(), *self._spares, *self._heirs, *chain(*self._unborn)):
            os.close(fd)
        close(self._chief)
        self._requests.detach()

    def _reap(self) -> None:
        while self._reap_one(os.WNOHANG):
            pass

    def _reap_one(self, options: int = 0) -> bool:
        """Tell how a child ended, waiting for it if *options* don't forbid that; return whether one did."""
        try:
            pid, status = os.waitpid(-1, options)
        except ChildProcessError:
            return False
        epitaph = self._epitaphs.pop(pid, None)
        if epitaph is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(epitaph, STATUS.pack(os.waitstatus_to_exitcode(status)))
            os.close(epitaph)
            self._leftovers.add(pid, leeway=0.0 if status else LEEWAY)
        return pid != 0

    def _end(self) -> NoReturn:
        for pid in self._epitaphs:
            os.kill(pid, signal.SIGKILL)
        while self._epitaphs and self._reap_one():
            pass
        if self._leftovers.due is not None or not (self._first or self._chief_has_seen_to_it()):
            self._leftovers.finish()
        for heir in self._heirs:
            with contextlib.suppress(OSError):  # it was killed
                os.write(heir, FAREWELL)
        while self._reap_one():  # the spare, which was told to end before us
            pass
        with contextlib.suppress(OSError):
            self._requests.sendall(FAREWELL)
        os._exit(0)

    def _chief_has_seen_to_it(self) -> bool:
        """Wait until the keeper whose spare we are says so, or dies (it may have been killed just now)."""
        return self._chief >= 0 and os.read(self._chief, 1) == FAREWELL


def threads_run() -> bool:
    """
    Return whether this process has Python threads besides the calling one.

    Threads of C libraries don't count: those that matter (OpenBLAS, glibc's resolver) put their locks right
    after a fork, and with numpy imported nobody could fork otherwise.
    """
    return threading.active_count() > 1


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
    """
    Return whether this process may have something in a buffer, besides its standard streams.

    To look for files among all objects takes as long as all else that a start does.
    """
    try:
        return any(map(_is_written, os.listdir("/proc/self/fd")))  # noqa: PTH208
    except OSError:
        return True


def _is_written(name: str) -> bool:
    fd = int(name)
    try:
        mode = os.fstat(fd).st_mode
        if fd <= 2 or not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
            return False
        writes = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        return writes and not os.readlink(f"/proc/self/fd/{name}").startswith(OUR_MEMORY)  # noqa: PTH115
    except OSError:  # the listing's own
        return False
