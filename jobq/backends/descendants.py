"""
What jobs started and left behind, of workers that have ended: it is found, and ended.

What a job forks hangs on the lifeline. A program that it starts keeps nothing of ours: no descriptors, and if
it makes itself a daemon, neither parent nor session. What it does keep are its limits. So a worker carries a
*mark* in one that nobody ever meets, and all its descendants inherit that, through `fork` and `exec`:

    RLIMIT_RTTIME = 2**61 | number of the run (39 bits) | number of the worker (22 bits)

These are the microseconds that a real-time process may compute without a pause; 2**61 are 73,000 years. The
number of the run is random, so whoever carries its mark descends from its workers. Where a job has a run of
its own, the soft limit is the inner one's mark, and the hard limit, twice as far off, the outer one's.

To read the limits of all processes takes about a microsecond for each, and is done only when a worker has
ended. Needs Linux 5.3; elsewhere nothing is marked, and nothing found.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator

from jobq.backends.channel import readable

#: Seconds that what a worker left has to end by itself, where that has ended as it was told to: a program
#: that was given its last input, and that nobody waits for, may be about to write its output.
LEEWAY = 0.5
#: Seconds between asking to end (SIGTERM) and SIGKILL.
GRACE = 0.5
#: Seconds after SIGKILL until what doesn't end, as it waits for a device, is left to the system.
GIVING_UP = 2.0
#: Seconds until the next look at what was killed.
SOON = 0.01
#: A look takes at most one part in so many of the time: where there are many processes it is long.
SHARE = 10
FAR_OFF = 1 << 61
#: Numbers of processes are smaller on Linux.
MOST_WORKERS = 1 << 22
#: What is no reason to believe that a process has gone.
WANT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def new_number() -> int:
    """Return a number for a run that no other one has."""
    return int.from_bytes(os.urandom(5), "big") >> 1


def mark(run: int) -> None:
    """Let this process, a worker of *run*, be known by its descendants, unless somebody needs the limit."""
    with contextlib.suppress(AttributeError, OSError, OverflowError, ValueError):  # not here, or not allowed
        soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
        own = _mark(run, os.getpid())
        if all(limit == resource.RLIM_INFINITY or limit >= FAR_OFF for limit in (soft, hard)):
            outer = FAR_OFF + own if hard == resource.RLIM_INFINITY else hard
            resource.setrlimit(resource.RLIMIT_RTTIME, (own, outer))


def marked(run: int) -> Iterator[tuple[int, int]]:
    """Yield all processes that carry a mark of *run*, and the worker that each descends from, or is."""
    try:
        names = os.listdir("/proc")  # noqa: PTH208
        kind, limits = resource.RLIMIT_RTTIME, resource.prlimit
    except (AttributeError, OSError):
        return
    least = _mark(run, 0)
    for name in names:
        if name.isdecimal():
            try:
                soft, hard = limits(int(name), kind)
            except OSError:  # it has ended, or is another user's
                continue
            if hard < FAR_OFF:  # as nearly all have it, which is most of the work
                continue
            for limit in (soft, hard - FAR_OFF):
                if least <= limit < least + MOST_WORKERS:
                    yield int(name), limit - least
                    break


def _mark(run: int, worker: int) -> int:
    return FAR_OFF | run * MOST_WORKERS | worker


class Leftovers:
    """
    Ends what the workers of one run have left: by SIGTERM, at once or after a leeway, then by SIGKILL.

    Nothing here waits but `finish`: `look` is to be called at the time `due`.
    """

    def __init__(self, run: int) -> None:
        self.run = run
        self.due: float | None = None  # by time.monotonic()
        #: Workers that have ended: when what they left is asked to end, and when it is killed.
        self._times: dict[int, tuple[float, float]] = {}
        self._told: set[int] = set()  # processes that were asked to end
        self._rested = 0.0
        self._rest: tuple[float, float] | None = None  # the same for all others; None: they are workers still

    def add(self, worker: int, *, leeway: float = 0.0, grace: float = GRACE) -> None:
        """Let what *worker* has left be ended: it has gone itself."""
        now = time.monotonic()
        self._times[worker] = (now + leeway, now + leeway + grace)
        due = max(now, self._rested)
        self.due = due if self.due is None else min(self.due, due)

    def keep(self, worker: int) -> None:
        """Leave alone what *worker*, which has just begun, starts: an earlier one had the same number."""
        self._times.pop(worker, None)

    def look(self) -> None:
        """End what there is, and say when to look again."""
        began = time.monotonic()
        left: dict[int, tuple[float, float]] = {}
        told, due = set(), math.inf
        for pid, worker in marked(self.run):
            times = self._times.get(worker, self._rest)
            if times is None or began >= times[1] + GIVING_UP:
                continue
            if began < times[0]:
                due = min(due, times[0])
            elif self._ask(pid, worker, kill=began >= times[1]):
                told.add(pid)
                due = min(due, times[1])
            else:
                continue
            left[worker] = times
        self._times, self._told = left, told
        now = time.monotonic()
        self._rested = now + SHARE * (now - began)
        self.due = max(now + SOON, due) if left else None

    def finish(self) -> None:
        """End whatever is left of the run, and return when it is gone. All its workers have ended."""
        now = time.monotonic()
        self._rest = (now, now + GRACE)
        self.look()
        while self.due is not None:
            # It will mostly have gone long before it is due to be killed.
            time.sleep(SOON)
            self.look()

    def _ask(self, pid: int, worker: int, *, kill: bool) -> bool:
        """Ask a process to end, or kill it; return whether it may still be there."""
        try:
            process = os.pidfd_open(pid)
        except (AttributeError, OSError) as error:
            return getattr(error, "errno", None) in WANT
        try:
            # The number may have become another's since it was listed; the descriptor stays with one process.
            soft, hard = resource.prlimit(pid, resource.RLIMIT_RTTIME)
            if _mark(self.run, worker) not in (soft, hard - FAR_OFF):
                return False
            if readable(process, 0):  # it has ended, and nobody has asked how
                return False
            if kill:
                signal.pidfd_send_signal(process, signal.SIGKILL)
            elif pid not in self._told:
                signal.pidfd_send_signal(process, signal.SIGTERM)
        except OSError:  # it has gone, or has become another user's: then it is not ours to end
            return False
        finally:
            os.close(process)
        return True


class Attendant:
    """
    Sees to what is left where there is no keeper to do it.

    In a thread, which is there only while something is left.
    """

    def __init__(self, run: int) -> None:
        self.run = run
        self._leftovers = Leftovers(run)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def add(self, worker: int, *, leeway: float) -> None:
        """Let what *worker* has left be ended: it has gone itself. Doesn't wait."""
        if self._closing.is_set():  # what is left then, is left to `finish`
            return
        with self._lock:
            self._leftovers.add(worker, leeway=leeway)
            self._leftovers.look()
            if self._leftovers.due is not None and self._thread is None:
                self._thread = threading.Thread(target=self._attend, name="jobq-leftovers", daemon=True)
                self._thread.start()

    def keep(self, worker: int) -> None:
        """Leave alone what *worker*, which has just begun, starts: an earlier one had the same number."""
        with self._lock:
            self._leftovers.keep(worker)

    def kill(self, worker: int) -> None:
        """Kill what *worker* has left, without a thread: where one runs nobody may fork."""
        with self._lock:
            self._leftovers.add(worker, grace=0.0)
            self._leftovers.look()

    def close(self) -> None:
        """Leave the rest to `finish`. Idempotent."""
        self._closing.set()
        if (thread := self._thread) is not None:
            thread.join()

    def finish(self) -> None:
        """End whatever is left of the run, and return when it is gone. All its workers have ended."""
        self.close()
        self._leftovers.finish()

    def _attend(self) -> None:
        while True:
            with self._lock:
                if self._leftovers.due is None:
                    self._thread = None
                    return
                patience = self._leftovers.due - time.monotonic()
            if self._closing.wait(max(0.0, patience)):
                return
            with self._lock:
                self._leftovers.look()
