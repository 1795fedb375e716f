"""Worker processes started by `multiprocessing`: forkserver and spawn, where forking isn't safe."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from jobq.backend import Plan
from jobq.backends import child
from jobq.backends.channel import close, readable
from jobq.backends.descendants import LEEWAY, Attendant
from jobq.errors import BackendUnavailable
from jobq.load import UNGUARDED
from jobq.wire import PROTOCOL

#: Seconds to wait for a killed process before leaving it to the system.
REAPING = 5
#: Seconds to wait for the fork server to say how a worker ended that has ended for certain.
MOURNING = 1
#: multiprocessing's exit code for a process whose fork server was lost.
SERVER_LOST = 255
#: What starting a process takes for a moment, at most.
MOST_DESCRIPTORS = 8


class Launcher:
    """Starts processes for a plan, by one start method."""

    def __init__(self, plan: Plan, method: str, attendant: Attendant) -> None:
        self._plan = plan
        self._attendant = attendant
        # Any: the stubs give the process class to the contexts of each method, not to their common base.
        self._process: Any = getattr(multiprocessing.get_context(method), "Process")  # noqa: B009
        self._own_children = method == "spawn"
        self.recipes: dict[str, bytes] = {}
        for name, recipe in plan.recipes.items():
            try:
                self.recipes[name] = pickle.dumps(recipe, PROTOCOL)
            except Exception as error:  # pickling is user code
                raise BackendUnavailable(
                    f"stage {name} can't be sent to a process started by {method}: {error}. "
                    "Define its functions at the top of a module, or use start_method='fork'."
                ) from error
        self._broken, self._lifeline = os.pipe()
        self._uses_server = method == "forkserver"
        if self._uses_server:
            _server.use({type(recipe).__module__ for recipe in plan.recipes.values()})

    def start(self, name: str, recipe: str, descriptors: list[int]) -> Launched:
        """Start a process that owns *descriptors* (inbox, outbox, page, arena); its recipe comes later."""
        ends = child.Ends(*map(child.Descriptor, (*descriptors, self._broken)))
        options = {
            "run": self._attendant.run,
            "daemon": self._plan.daemon.get(recipe, True),
            "stdin": self._plan.stdin.get(recipe),
            "preload": self._plan.preload,
        }
        # Nothing large in the arguments: `start` would wait for ever if the child died before reading them.
        process = self._process(target=child.main, args=(ends,), kwargs=options, name=name, daemon=True)
        self._make_sure_of_room()
        try:
            with _library_first(), _deaf_to_the_terminal():
                if self._uses_server:
                    _server.make_sure_it_runs()
                process.start()
        except AssertionError as error:
            raise BackendUnavailable(f"{error}; start_method='fork' can be used here") from error
        except (EOFError, ConnectionError) as error:
            if self._uses_server and _server.ended_with(UNGUARDED):
                raise BackendUnavailable(
                    f"the fork server {child.describe_exit(UNGUARDED)}: it imports the program as a module"
                ) from error
            raise OSError(errno.ECONNRESET, f"can't start worker {name}: the fork server was lost") from error
        return Launched(process, self._attendant, own_child=self._own_children)

    def _make_sure_of_room(self) -> None:
        # multiprocessing loses descriptors, or its server, if it runs out of them on the way.
        with contextlib.ExitStack() as given_back:
            for _ in range(MOST_DESCRIPTORS):
                given_back.callback(os.close, os.dup(self._broken))

    def close(self) -> None:
        """Leave nothing running. Called when every process has been released. Idempotent."""
        self.forget()
        if self._uses_server:
            self._uses_server = False
            _server.leave()

    def forget(self) -> None:
        """Close the lifeline: what still runs is killed. Idempotent."""
        fds = {self._broken, self._lifeline}
        self._broken = self._lifeline = -1
        for fd in fds:
            close(fd)


class _Server:
    """
    Our use of multiprocessing's one fork server.

    It would go on until the interpreter ends. So whoever of us started it stops it, if nobody else has a
    process of it by then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._ours = False
        self._door = -1

    def use(self, modules: set[str]) -> None:
        """Let the server start, with jobq (and those of *modules* that are jobq's) imported once for all."""
        with self._lock:
            self._users += 1
            if self._users == 1 and _server_state()._forkserver_pid is None:
                self._ours = True
                if _server_state()._preload_modules == ["__main__"]:
                    own = sorted(name for name in modules if name.startswith("jobq."))
                    forkserver.set_forkserver_preload(["__main__", child.__name__, *own])

    def make_sure_it_runs(self) -> None:
        """
        Start the server if it doesn't run, with nothing of it in the file system.

        A driver that is killed can't remove the socket under which its server is reached. So it is removed
        at once, and reached by a descriptor. (An abstract socket would be open to every user.)
        """
        with self._lock:
            if not self._ours or _runs(_server_state()._forkserver_pid) or not _DESCRIPTORS_ARE_PATHS:
                return
            config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
            before = config.get("tempdir")
            with tempfile.TemporaryDirectory(prefix="jobq-") as path:
                folder = os.open(path, os.O_PATH)
                try:
                    # By number, since the address of a socket must be short.
                    config["tempdir"] = f"/proc/self/fd/{folder}"
                    _server_state().ensure_running()
                    self._close_door()
                    self._door = os.open(_server_state()._forkserver_address, os.O_PATH)
                    _server_state()._forkserver_address = f"/proc/self/fd/{self._door}"
                finally:
                    config["tempdir"] = before
                    os.close(folder)

    def ended_with(self, code: int) -> bool:
        """Return whether the server, which has closed its socket, ended with this exit code."""
        pid = _server_state()._forkserver_pid
        try:
            end = os.pidfd_open(pid)
            try:
                readable(end, REAPING)
            finally:
                os.close(end)
            status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except (OSError, TypeError, AttributeError):
            return False
        return status is not None and (status.si_code, status.si_status) == (os.CLD_EXITED, code)

    def _close_door(self) -> None:
        fd, self._door = self._door, -1
        close(fd)

    def leave(self) -> None:
        """Stop the server after its last use, if it was ours."""
        with self._lock:
            self._users -= 1
            if self._users or not self._ours:
                return
            self._ours = False
            server = _server_state()
            if server._forkserver_pid is not None and not multiprocessing.active_children():
                # Killed, since it would wait for every process that holds its descriptor, such as a job's.
                with contextlib.suppress(OSError):
                    os.kill(server._forkserver_pid, signal.SIGKILL)
                with contextlib.suppress(OSError):  # it can't remove what is not there
                    server._stop()
                server._forkserver_address = None
                self._close_door()
            server._preload_modules = ["__main__"]


_server = _Server()
_DESCRIPTORS_ARE_PATHS = hasattr(os, "O_PATH") and Path("/proc/self/fd").is_dir()


def _runs(pid: int | None) -> bool:
    """Return whether a child of ours runs; leaves its status to be waited for."""
    return pid is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _server_state() -> Any:
    return forkserver._forkserver  # Any: most of it is not in the stubs


_starting = threading.Lock()


@contextlib.contextmanager
def _library_first() -> Iterator[None]:
    """
    Let a process that is started here not import its own needs from the current folder.

    `multiprocessing` starts ``python -c``, which looks there first; later it hands over our ``sys.path``.
    """
    with _starting:
        before = util._args_from_interpreter_flags  # type: ignore[attr-defined]
        util._args_from_interpreter_flags = lambda: [*before(), "-P"]  # type: ignore[attr-defined]
        try:
            yield
        finally:
            util._args_from_interpreter_flags = before  # type: ignore[attr-defined]


@contextlib.contextmanager
def _deaf_to_the_terminal() -> Iterator[None]:
    """Let a process that is spawned here not hear Ctrl-C before it has said that it doesn't want to."""
    resource_tracker.ensure_running()  # its start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD,))  # a fork server hears of deaths by it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Launched:
    """A process started by `multiprocessing`. ``fd`` is readable when it has ended."""

    def __init__(self, process: BaseProcess, attendant: Attendant, *, own_child: bool) -> None:
        assert process.pid is not None
        self._attendant = attendant
        attendant.keep(process.pid)
        self.pid = process.pid
        self._process = process
        self._own_child = own_child
        self._how: str | None = None
        self._pidfd = -1
        self._released = False
        with contextlib.suppress(OSError, AttributeError):
            self._pidfd = os.pidfd_open(self.pid)
        # A sentinel is a pipe: our own child's may be held open by grandchildren, and that of a fork server's
        # child ends with the server, while the child lives.
        self.fd = self._pidfd if self._pidfd >= 0 else process.sentinel

    def ended(self) -> str | None:
        """Return how the process ended, or None while it runs."""
        if self._how is None and (self._pidfd < 0 or readable(self._pidfd, 0)):
            if not self._own_child:
                readable(self._process.sentinel, MOURNING)  # the server tells how, a moment later
            code = self._process.exitcode
            if code is not None and (self._own_child or code != SERVER_LOST):
                self._how = child.describe_exit(code)
            elif self._pidfd >= 0 or code is not None:
                self._how = "ended, how is not known"  # somebody else's wait() took the exit code
        return self._how

    def kill(self) -> None:
        """Kill the process if it still runs."""
        if self._released or self.ended() is not None:
            return
        with contextlib.suppress(OSError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            else:
                self._process.kill()

    def release(self) -> None:
        """Reap the process, have what it left ended, and close the descriptors. Idempotent."""
        if self._released:
            return
        if self.ended() is None:
            self.kill()
            readable(self.fd, REAPING)
            self.ended()  # which waits for the fork server's word too
        self._released = True
        well = self._process.exitcode == 0
        if self._process.exitcode is not None:
            self._process.join()
            self._process.close()
        self._attendant.add(self.pid, leeway=LEEWAY if well else 0.0)
        self.forget()

    def forget(self) -> None:
        """Close the descriptor only. Idempotent."""
        self._released = True
        fd, self._pidfd = self._pidfd, -1
        close(fd)
