"""Worker processes started by `multiprocessing`: forkserver and spawn, where forking isn't safe."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import select
import signal
from multiprocessing.process import BaseProcess
from typing import Any

from jobq.backend import Plan
from jobq.backends import child
from jobq.backends.channel import close
from jobq.errors import BackendUnavailable
from jobq.wire import PROTOCOL

#: Seconds to wait for a killed process before leaving it to the system.
REAPING = 5


class Launcher:
    """Starts processes for a plan, by one start method."""

    def __init__(self, plan: Plan, method: str) -> None:
        self._plan = plan
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

    def start(self, name: str, recipe: str, descriptors: list[int]) -> Launched:
        """Start a process that owns *descriptors* (inbox, outbox, page); its recipe comes by the inbox."""
        ends = child.Ends(*map(child.Descriptor, (*descriptors, self._broken)))
        options = {"daemon": self._plan.daemon.get(recipe, True), "preload": self._plan.preload}
        # Nothing large in the arguments: `start` would wait for ever if the child died before reading them.
        process = self._process(target=child.main, args=(ends,), kwargs=options, name=name, daemon=True)
        try:
            process.start()
        except AssertionError as error:
            raise BackendUnavailable(f"{error}; start_method='fork' can be used here") from error
        return Launched(process, own_child=self._own_children)

    def close(self) -> None:
        """Close the lifeline: what still runs is killed. Idempotent."""
        fds = {self._broken, self._lifeline}
        self._broken = self._lifeline = -1
        for fd in fds:
            close(fd)


class Launched:
    """A process started by `multiprocessing`. ``fd`` is readable when it has ended."""

    def __init__(self, process: BaseProcess, *, own_child: bool) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._process = process
        self._how: str | None = None
        self._pidfd = -1
        self._released = False
        with contextlib.suppress(OSError, AttributeError):
            self._pidfd = os.pidfd_open(self.pid)
        # Our own child's sentinel is a pipe that grandchildren may hold open. With the fork server
        # only the server holds it, and it brings the exit code, which a pidfd doesn't.
        self.fd = self._pidfd if own_child and self._pidfd >= 0 else process.sentinel

    def ended(self) -> str | None:
        """Return how the process ended, or None while it runs."""
        if self._how is None:
            code = self._process.exitcode
            if code is not None:
                self._how = child.describe_exit(code)
            elif self.fd == self._pidfd and _readable(self.fd, 0):
                self._how = "has ended"  # somebody else's wait() took the exit code
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
        """Reap the process, and close the descriptors. Idempotent."""
        if self._released:
            return
        if self.ended() is None:
            self.kill()
            _readable(self.fd, REAPING)
        self._released = True
        if self._process.exitcode is not None:
            self._process.join()
            self._process.close()
        self.forget()

    def forget(self) -> None:
        """Close the descriptor only. Idempotent."""
        self._released = True
        fd, self._pidfd = self._pidfd, -1
        close(fd)


def _readable(fd: int, seconds: float) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])
