"""
The loop that takes every decision of a run, in one thread.

    wait ─> receive ─> scheduler.settle ─> tell (events) ─> dispatch: scheduler.take, grant ─> wait …

It runs no user code and decodes no items. It waits in one place, for descriptors of workers (answers and
deaths), of the sink, and of whoever wants to wake it (signals, other threads); every wait has an end.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal as signals
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from jobq import events, faults
from jobq.allotment import Allotment
from jobq.backend import HINT, Backend, Waitable, Worker
from jobq.errors import BackendUnavailable, BrokenChannel, EndOfChannel, SpoiltChannel
from jobq.pool import CRASH_LIMIT, SLOW_SECONDS, Member, Pool, describe_lack
from jobq.report import EdgeCounts, StageCounts, counted
from jobq.scheduler import CHUNK_JOBS, Dead, Line, Retried, Scheduler
from jobq.stage import CLOSING
from jobq.wire import Answer, Chunk, Hello, Part

if TYPE_CHECKING:
    from jobq.inlet import Entrance
    from jobq.results import Sink

#: While the run is being stopped, a producer that does not come back to its yield is waited for so long
#: beyond everything else.
PRODUCER_GRACE_SECONDS = 1.0
#: Where nobody wants what is still to come, whoever has something in hand is waited for so long, in seconds.
LEAVING_SECONDS = 1.0
#: How often those who listen hear of the counts, in seconds.
TICK_SECONDS = 0.1

#: A chunk whose outputs another stage waits for takes no longer than this, in seconds.
WANTED_SECONDS = 0.005

#: A killed worker is gone at once, unless the kernel holds it: then we don't wait for it.
KILL_GRACE_SECONDS = 5.0

#: When nothing happens for so long, what was done at leisure is put at rest.
REST_SECONDS = 0.05

#: Where the system refuses a process or a descriptor, it is asked again after so long.
RETRY_SECONDS = 0.5

#: For so long in vain, while the stage has no worker at all, and the run gives up.
DESERTED_SECONDS = 10.0

#: A call that is so little late is late by our clock's fault: the next one comes when it was to come.
LATE_SECONDS = 0.005

FINISH, STOP, KILL = 1, 2, 3

#: Why a run is stopped, in words.
REASONS = {
    0: "the time for finishing is over",
    signals.SIGINT: "interrupted",
    signals.SIGTERM: "terminated",
    signals.SIGHUP: "the terminal was closed",
}


@dataclass(slots=True)
class Ending:
    """Why and how the run is being ended before its time."""

    level: int = 0
    signal: int | None = None
    gave_up: str | None = None
    halted: bool = False  # max_failures: jobs in progress finish, the rest is cancelled
    interrupted: bool = False  # producers had more to give, or work was left undone
    killed: bool = False
    deadline: float = math.inf
    since: float = math.inf


@dataclass(slots=True)
class Cancelled:
    """
    Jobs that never came to their end, to be made letters of at leisure.

    Those numbered in ``unloadable`` are left pickled: a worker was stopped while it loaded them.
    """

    stage: str
    parts: list[Part] = field(default_factory=list)
    unloadable: set[int] = field(default_factory=set)


class Clock(Protocol):
    """What tells the time: the module `time`, or a simulation's clock."""

    def monotonic(self) -> float:
        """Return seconds that only grow."""
        ...

    def monotonic_ns(self) -> int:
        """Return the same in nanoseconds."""
        ...


class Desk(Protocol):
    """Somebody whom the loop has to let work whenever ``fd`` is readable (-1: never)."""

    fd: int

    def serve(self) -> None:
        """Do what there is to do. Never waits."""
        ...

    def close(self) -> None:
        """Leave nothing behind. Idempotent."""
        ...


class Leisure(Protocol):
    """What the loop does a little of between two steps, so that less is left for the end."""

    @property
    def behind(self) -> bool:
        """Whether there is something to do."""
        ...

    def catch_up(self) -> None:
        """Do a little of it: some tenths of a millisecond. Runs no user code."""
        ...

    @property
    def restless(self) -> bool:
        """Whether `rest` is wanted when there is nothing to do for a while."""
        ...

    def rest(self) -> None:
        """Be as if nothing had been done. Idempotent."""
        ...


@dataclass(slots=True)
class Keeper:
    """The worker that has the run-scoped resources: up before all others, and gone after them."""

    worker: Worker
    ready: bool = False
    closing: bool = False
    killed: bool = False  # by us
    registered: tuple[Waitable, ...] = ()


class Driver:
    """One run: give it its parts, call `run`, then read the scheduler's books."""

    def __init__(
        self,
        scheduler: Scheduler,
        backend: Backend,
        sizes: dict[str, int],
        sink: Sink,
        tell: Callable[[events.Event], None],
        *,
        timeout: float | None = None,
        shutdown_timeout: float = 30.0,
        failure_limit: int | None = None,
        letter: Callable[[Dead], events.JobDead],
        ticking: bool = False,
        inlet: Entrance | None = None,
        desk: Desk | None = None,
        keeper: str | None = None,
        clock: Clock = time,
        selector: selectors.BaseSelector | None = None,
        automatic: Collection[str] = (),
        leisure: Leisure | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.sink = sink
        self.ending = Ending()
        self.cancelled: list[Cancelled] = []
        self._unloadable: dict[str, set[int]] = {}
        self._backend = backend
        self._tell = tell
        self._letter = letter
        self._shutdown_timeout = shutdown_timeout
        self._failure_limit = failure_limit
        self._ticking = ticking
        self._clock = clock
        self._began = clock.monotonic()
        self._timeout = math.inf if timeout is None else timeout
        self._ends_at = self._began + self._timeout
        self._waits_until = math.inf  # for those who have something in hand, when nobody wants it
        self._leaving: deque[tuple[float, Member]] = deque()  # what retires may take until then to close
        self._next_tick = self._began
        self._selector = selectors.DefaultSelector() if selector is None else selector
        self._sink_watched: Waitable | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._desk = desk
        if desk is not None and desk.fd >= 0:
            self._selector.register(desk.fd, selectors.EVENT_READ, desk)
        self._leisure = leisure
        self._keeper_recipe = keeper
        self._keeper: Keeper | None = None
        self._closing = False
        self._abandoned = False
        self._anybody_came_up = False
        # Where jobs run in this very thread, what is given out ahead only keeps others from their turn.
        self._ahead = 2 if backend.own_thread else 1
        self._hopeless = False  # a killed worker does not go away: it is left to the backend
        self._requested: list[int] = []
        self._calls: deque[Callable[[], None]] = deque()
        self.inlet = inlet
        self.paused = False
        self._checks: dict[str, float] = {}
        self._gave_at = self._began  # when it was last looked what can be given out
        scheduler.results_room = lambda: sink.room
        self.pools = {
            name: Pool(line, backend, sizes[name], self._started) for name, line in scheduler.lines.items()
        }
        self._producers = [pool for pool in self.pools.values() if pool.line.is_producer]
        self._limited = [pool for pool in self.pools.values() if pool.limit is not None]
        self._consumers = [pool for pool in self.pools.values() if not pool.line.is_producer]
        for pool in self._consumers:
            pool.follows_consumers = any(
                pool.line in takers for one in self._consumers for takers in one.line.takers
            )
        self.automatic = frozenset(automatic if backend.own_thread else ())
        self._allotment: Allotment | None = None
        if self.automatic:
            self._allotment = Allotment(
                [*self.pools.values()],
                [self.pools[name] for name in automatic],
                self._began,
                threads=backend.codec.by_reference,
            )

    # ── from outside ─────────────────────────────────────────────────────────

    @property
    def wake_fd(self) -> int:
        """A non-blocking descriptor that wakes the loop when a byte is written to it."""
        return self._wake_write

    @property
    def stops(self) -> int:
        """How often the run was asked to stop."""
        return self.ending.level + len(self._requested)

    @property
    def signal(self) -> int | None:
        """The first stop signal that it was told of, also if the run had ended by then."""
        return self.ending.signal or next(filter(None, self._requested), None)

    @property
    def abandoned(self) -> bool:
        """Whether the run was stopped because nobody wants what was still to come."""
        return self._abandoned

    def wake(self) -> None:
        """Make the loop look again. Safe from any thread and from signal handlers."""
        try:  # noqa: SIM105  # half the price of the context manager
            os.write(self._wake_write, b"\0")
        except BlockingIOError:  # full: it will wake anyway
            pass

    def call(self, function: Callable[[], None]) -> None:
        """Have *function* run in the driver's thread, soon. Safe from any thread."""
        self._calls.append(function)
        self.wake()

    def request_stop(self, signal: int | None = None) -> None:
        """Ask for the next step of the ladder: finish, stop, kill. Safe from signal handlers."""
        self._requested.append(signal or 0)
        self.wake()

    def heed(self) -> None:
        """Take the steps that were asked for. A signal handler may call it while a job runs in its thread."""
        while self._requested:
            self._escalate(self._requested.pop(0), self._clock.monotonic())

    def abandon(self) -> None:
        """
        Stop soon: nobody wants what is left. Jobs queued are cancelled, and those in flight that take longer.

        Whoever has nothing in hand closes what it has opened, as at any end.
        """
        self._abandoned = True
        self.wake()

    # ── the loop ─────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Work until everything is settled and every worker is gone."""
        try:
            self.begin()
            while not self.step():
                pass
        finally:
            self.release()

    def begin(self) -> None:
        """Start every worker; where there is a keeper, when it is up."""
        if self._keeper_recipe is None:
            self._start_pools()
        else:
            try:
                self._keeper = Keeper(self._backend.start(self._keeper_recipe, self._keeper_recipe))
            except OSError as error:
                raise BackendUnavailable(
                    f"the keeper of the run-scoped resources: {describe_lack(error)}"
                ) from error
            self._watch(self._keeper)

    def _start_pools(self) -> None:
        for pool in self.pools.values():
            try:
                pool.start()
            except OSError as error:
                raise BackendUnavailable(f"stage {pool.line.name}: {describe_lack(error)}") from error

    def step(self) -> bool:
        """Wait for the next thing to happen and deal with it; return whether the run has ended."""
        for key, _ in self._wait():
            if isinstance(key.data, Member):
                if not key.data.gone:  # its answer and its death may be told in one wait
                    self._hear(key.data)
            elif isinstance(key.data, Keeper):
                self._hear_keeper(key.data)
            elif key.fd == self._wake_read:
                self._drain_wakeups()
            elif self._desk is not None and key.data is self._desk:
                self._desk.serve()
        self._advance()
        if not self._closing or not (self._deserted() or self._hopeless):
            return False
        self._cancel_rest()
        return True

    def _wait(self) -> Sequence[tuple[selectors.SelectorKey, int]]:
        """Return what has happened, waiting for it."""
        if (leisure := self._leisure) is not None:
            while leisure.behind:
                leisure.catch_up()
                if happened := self._selector.select(0):
                    return happened
            if leisure.restless:
                patience = self._patience()
                wait = REST_SECONDS if patience is None else min(patience, REST_SECONDS)
                if happened := self._selector.select(wait):
                    return happened
                leisure.rest()
        return self._selector.select(self._patience())

    def _deserted(self) -> bool:
        """Whether every worker is gone; the keeper is told to go when all others are."""
        if any(pool.members for pool in self.pools.values()):
            return False
        keeper = self._keeper
        if keeper is not None and not keeper.closing:
            keeper.closing = True
            keeper.worker.close()
            self._watch(keeper)
        return keeper is None

    def _advance(self) -> None:
        """Do everything that can be done now."""
        now = self._clock.monotonic()
        if self._requested:
            self.heed()
        while self._calls:
            self._calls.popleft()()
        if self.inlet is not None and not self._closing:
            self._let_in(self.inlet, now)
        self._watch_sink()
        if self._abandoned and self.ending.level < STOP:
            self._leave_off(now)
        if self.ending.level or self.ending.halted:
            self._press(now)
        self._look_at_clocks(now)
        if not self._closing:
            if not self.ending.halted and not self.paused:
                self._dispatch(now)
            if self._allotment is not None:
                self._allotment.note(now)
            self._conclude(now)
        elif now >= self.ending.deadline:
            self._lose_patience()
        elif now >= self._waits_until:
            self._waits_until = math.inf
            self._kill_the_busy()

    def _look_at_clocks(self, now: float) -> None:
        """Do what is due by now, whoever did or didn't say something."""
        if now >= self._ends_at:
            self._give_up(f"the run took longer than its timeout of {self._timeout:g} s")
        while self._leaving and (self._leaving[0][1].gone or now >= self._leaving[0][0]):
            member = self._leaving.popleft()[1]
            if not member.gone:
                member.worker.kill()
        for pool in self._consumers:
            if pool.retry_at is not None and now >= pool.retry_at and not self._closing:
                self._fill(pool)
        for pool in self._limited:
            if pool.look_at is not None and now >= pool.look_at:
                self._enforce_limit(pool)
        if self._allotment is not None and now >= self._allotment.look_at and self._steady:
            for pool, size in self._allotment.look(now):
                self._resize(pool, size)
        if self._ticking and now >= self._next_tick:
            self._next_tick = now + TICK_SECONDS
            self._tell(events.Tick(now - self._began, self.counts()))

    def _patience(self) -> float | None:
        """Return the seconds until something is due by itself; None: nothing is."""
        times = [self.ending.deadline, self._ends_at, self._waits_until]
        now = self._clock.monotonic()
        if self._leaving:
            times.append(self._leaving[0][0])
        if not self._closing:
            giving = not (self.ending.halted or self.paused)
            for pool in self._consumers:
                if pool.retry_at is not None:
                    times.append(pool.retry_at)
                if giving:
                    times += self._gives_at(pool)
            if giving:
                times += self._checks.values()
            if self._allotment is not None and self._steady and not self._allotment.idle:
                times.append(self._allotment.look_at)
            times += [pool.look_at for pool in self._limited if pool.look_at is not None]
            if now < self.ending.since + PRODUCER_GRACE_SECONDS:
                times.append(self.ending.since + PRODUCER_GRACE_SECONDS)
        if self._ticking:
            times.append(self._next_tick)
        due = min(times)
        return None if due == math.inf else max(0.0, due - now)

    @property
    def _steady(self) -> bool:
        """Whether the run goes its way: jobs are given out, and nobody has asked it to end."""
        return not (self._closing or self.paused or self.ending.halted or self.ending.level)

    def _gives_at(self, pool: Pool) -> Iterable[float]:
        """Yield when there will be something to give out, though nobody says anything until then."""
        line = pool.line
        if pool.call_at is not None:
            yield pool.call_at
        if line.delayed:
            yield self.scheduler.next_due(line)
        if line.batch is not None and line.oldest is not None:
            overdue = line.oldest + line.node.stage.consumer.batch_timeout
            # If it was overdue when we last looked, it waits for a worker, or for room: that will wake us.
            if overdue > self._gave_at:
                yield overdue

    def _drain_wakeups(self) -> None:
        try:  # noqa: SIM105  # half the price of the context manager
            os.read(self._wake_read, 4096)  # if there are more, the next wait ends at once
        except BlockingIOError:
            pass

    # ── what workers say ─────────────────────────────────────────────────────

    def _started(self, member: Member) -> None:
        self._watch(member)
        if self.ending.level:
            member.pool.stop_giving()
        worker = member.worker
        self._tell(events.WorkerStarted(member.pool.line.name, worker.name, worker.pid))

    def _watch(self, member: Member | Keeper) -> None:
        """Wait for what the worker wants us to wait for now."""
        waitables = member.worker.waitables
        if waitables is member.registered:
            return
        old = {one.fd: one.events for one in member.registered}
        new = {one.fd: one.events for one in waitables}
        for fd in old.keys() - new.keys():
            self._selector.unregister(fd)
        for fd, wanted in new.items():
            if fd not in old:
                self._selector.register(fd, wanted, member)
            elif old[fd] != wanted:
                self._selector.modify(fd, wanted, member)
        member.registered = waitables

    def _unwatch(self, member: Member | Keeper) -> None:
        for fd in {one.fd for one in member.registered}:
            self._selector.unregister(fd)
        member.registered = ()

    def _hear_keeper(self, keeper: Keeper) -> None:
        """Start the others when the keeper is up; give up when it is lost."""
        if self._keeper is None:
            return  # its end was told with something else in one wait
        try:
            while (said := keeper.worker.receive()) is not None:
                if isinstance(said, Hello) and not self._closing:
                    keeper.ready = True
                    self._start_pools()
            self._watch(keeper)
        except (EndOfChannel, BrokenChannel) as end:
            self._unwatch(keeper)
            self._keeper = None
            keeper.worker.release()
            if isinstance(end, BrokenChannel) and not keeper.killed:
                self._give_up(f"the keeper of the run-scoped resources {end}")

    def _hear(self, member: Member) -> None:
        """Take in everything that a worker has said."""
        line = member.pool.line
        try:
            while (said := member.worker.receive()) is not None:
                if isinstance(said, Answer):
                    self._settle(line, member, said)
                elif isinstance(said, Hello):
                    member.ready = self._anybody_came_up = True
                    member.worker.page[HINT] = self._hint(line)
            self._watch(member)
        except EndOfChannel:
            self._ended(member)
        except BrokenChannel as broken:
            self._lost(member, str(broken), spoilt=isinstance(broken, SpoiltChannel))

    def _settle(self, line: Line, member: Member, answer: Answer) -> None:
        scheduler, now, target = self.scheduler, self._clock.monotonic(), line.target
        member.totals = answer.totals
        if line.is_producer:
            scheduler.settle_grant(line, member.worker.name, answer, now)
            if answer.ended:
                # Did it end by itself, or since it saw that the run is being stopped?
                watches = bool(line.node.signature.job_names)
                self.ending.interrupted |= bool(self.ending.level) and watches
                given = answer.totals.done
                self._tell(events.ProducerEnded(line.name, member.worker.name, given))
        else:
            recalled = scheduler.settle(line, member.worker.name, answer, now)
            if line.target != target:
                self._hint_upstream(line)
            if member.recalled:
                member.recalled -= recalled
                if member.recalled <= 0 or not line.flights.get(member.worker.name):
                    member.allow_all()
            if answer.leaving or member.left == 0 or member.retiring:
                self._retire(member, answer.leaving)
        for index, done, total in answer.notes:
            job = None if line.is_producer else answer.number + index
            self._tell(events.Progress(line.name, member.worker.name, job, done, total))
        self._report_happenings()
        self._pass_results()
        self._tell_fates()
        if faults.armed:
            faults.reach("after_results")

    def _tell_fates(self) -> None:
        settled = self.scheduler.lineage.settled
        if settled and self.inlet is not None:
            self.inlet.settle(settled)
            settled.clear()

    def _pass_results(self) -> None:
        results = self.scheduler.results
        if results:
            for stage, block in results:
                self.sink.put(stage, block)
            results.clear()

    def _report_happenings(self) -> None:
        happened = self.scheduler.happened
        if not happened:
            return
        for one in happened:
            if isinstance(one, Retried):
                self._tell(
                    events.JobRetried(
                        one.stage,
                        one.worker,
                        one.part.first,
                        one.part.attempt,
                        one.failure.error,
                        one.failure.message,
                        one.delay,
                    )
                )
            else:
                self._tell(self._letter(one))
        happened.clear()
        dead = sum(line.books.dead for line in self.scheduler.lines.values())
        if self._failure_limit is not None and dead >= self._failure_limit and not self.ending.halted:
            self._halt()

    def _hint(self, line: Line) -> int:
        """Return how many outputs of *line* its takers like to get together; 1 if one of them starves."""
        if not line.is_producer and self._is_wanted(line):
            return 1
        return max((taker.target for takers in line.takers for taker in takers if taker), default=CHUNK_JOBS)

    def _is_wanted(self, line: Line) -> bool:
        """Whether a stage starves for what *line* gives."""
        return any(self.pools[taker.name].starves for takers in line.takers for taker in takers if taker)

    def _target(self, line: Line) -> int:
        """Return how many jobs a chunk should have: fewer where a stage waits for what they give."""
        if line.service and line.target > 1 and self._is_wanted(line):
            return max(1, min(line.target, int(WANTED_SECONDS / line.service)))
        return line.target

    def _hint_upstream(self, line: Line) -> None:
        for pool in self.pools.values():
            if any(line in takers for takers in pool.line.takers):
                hint = self._hint(pool.line)
                for member in pool.members:
                    if member.ready:
                        member.worker.page[HINT] = hint

    # ── workers end ──────────────────────────────────────────────────────────

    def _let_go(self, member: Member) -> None:
        """Tell a worker that no more orders come."""
        if not member.closing:
            member.closing = True
            member.worker.close()
            self._watch(member)

    def _retire(self, member: Member, why: str) -> None:
        """Let a worker end that begins no more jobs, or has had as many as it may: it will be replaced."""
        done = not member.load
        if not member.closing and (why or done):
            member.retiring = why or "it has had max_tasks_per_worker jobs"
            self._let_go(member)
        if member.retiring and done:
            self._leaving.append((self._clock.monotonic() + self._shutdown_timeout, member))

    def _ended(self, member: Member) -> None:
        pool, line = member.pool, member.pool.line
        self._forget(member)
        replaced = bool(member.retiring) and not (self._closing or self.ending.halted)
        replaced = replaced and pool.staying < pool.size
        why = member.retiring if replaced else ""
        self._tell(events.WorkerEnded(line.name, member.worker.name, member.worker.pid, why))
        if replaced:
            self._make_up(pool, member.index)
        if line.is_producer:
            if self.ending.level and member.worker.name not in line.ended:
                self.ending.interrupted = True  # it was stopped at a yield: it may have had more to give
            self.scheduler.end_producer(line, member.worker.name)
        else:
            self.scheduler.left(line, member.worker.name)

    def _lost(self, member: Member, reason: str, *, spoilt: bool = False) -> None:
        pool, line, name = member.pool, member.pool.line, member.worker.name
        tickets, decoding = (member.tickets(), member.decoding()) if member.ready else ([], None)
        if spoilt:  # perhaps by a job that has ended, and whose answer came too late
            decoding = min(line.flights.get(name, ()), default=None)
        in_hand = [
            flight.job(ticket - number)
            for number, flight in line.flights.get(name, {}).items()
            for ticket in tickets
            if 0 <= ticket - number < flight.chunk.count
        ]
        jobs = tuple(part.first for part in in_hand)
        limit = 0 if line.is_producer else line.node.stage.consumer.max_deliveries
        self._forget(member)
        back, stopped = 0, self.ending.killed or self.stops >= STOP
        again = len(in_hand) == 1 and in_hand[0].delivery < limit and not (member.overdue or stopped)
        deliveries = (in_hand[0].delivery + 1, limit) if again else ()
        if line.is_producer:
            self._lost_producer(line, name, reason)
        elif member.overdue:
            seconds = line.node.stage.consumer.timeout or 0.0
            reason = f"was stopped: its job took longer than {seconds:g} s"
            self.scheduler.overran(line, name, member.overdue, seconds, self._clock.monotonic())
            back = self.scheduler.lost(line, name, (), None, reason, self._clock.monotonic())
        elif stopped:  # by us: nobody is to blame
            if decoding in line.flights.get(name, {}):
                parts = line.flights[name][decoding].chunk.parts
                numbers = {part.first + i for part in parts for i in range(part.block.count)}
                self._unloadable.setdefault(line.name, set()).update(numbers)
            self.scheduler.lost(line, name, (), None, reason, self._clock.monotonic())
        else:
            back = self.scheduler.lost(line, name, tickets, decoding, reason, self._clock.monotonic())
        if not stopped or member.stopped:
            why = member.stopped or reason
            self._tell(
                events.WorkerLostEvent(line.name, name, member.worker.pid, why, jobs, back, *deliveries)
            )
        if CLOSING in reason.partition("\n")[0] and not stopped:
            # What its jobs had done is not undone, but nobody knows what became of it (a commit, say).
            self.ending.gave_up = self.ending.gave_up or f"stage {line.name}: worker {name} {reason}"
        self._report_happenings()
        self._pass_results()
        self._tell_fates()
        own_end = not reason.startswith(("was killed", "ended, how is not known"))
        if not self._closing and own_end and not member.ready and not self._anybody_came_up:
            self._give_up(f"stage {line.name}: the first worker ended before it was ready: {reason}")
        elif not line.is_producer and not self._closing:
            self._replace(
                pool, member, reason, blameless=not (tickets or member.overdue) and decoding is None
            )

    def _lost_producer(self, line: Line, name: str, reason: str) -> None:
        if name in line.ended or self.stops or self.ending.halted or self.ending.killed:
            self.ending.interrupted |= bool(self.stops) and name not in line.ended
            self.scheduler.end_producer(line, name)
        else:
            self.scheduler.lost_producer(line, name, reason)

    def _replace(self, pool: Pool, member: Member, reason: str, *, blameless: bool) -> None:
        deaths = pool.died() if blameless else 0
        if deaths >= CRASH_LIMIT:
            self._give_up(
                f"stage {pool.line.name}: {deaths} workers in a row ended before they finished a job;"
                f" the last one {reason}"
            )
            return
        if pool.staying < pool.size:
            pool.restarts += 1
            self._make_up(pool, member.index)

    def _make_up(self, pool: Pool, index: int) -> None:
        """Have a worker again in the place of one that has ended."""
        pool.missing.append(index)
        self._fill(pool)

    def _resize(self, pool: Pool, size: int) -> None:
        """Start workers, or let some go between jobs, so that the stage has *size* of them."""
        fewer = pool.staying - size
        pool.resize(size)
        if fewer > 0:
            for member in sorted([one for one in pool.members if not one.retiring], key=_load)[:fewer]:
                self._take_back(member)
                self._retire(member, "its stage has less to do")
            return
        pool.miss(-fewer)
        self._fill(pool)
        if pool.missing and self._allotment is not None:  # the system refuses: it will do without
            pool.resize(pool.size - len(pool.missing))
            pool.missing.clear()
            pool.retry_at = None
            self._allotment.hold(pool, self._clock.monotonic())

    def _fill(self, pool: Pool) -> None:
        """Start workers in the place of those that ended; where the system refuses, try again in a while."""
        try:
            while pool.missing:
                if faults.armed:
                    faults.reach("respawn")
                pool.replace(pool.missing[-1])
                pool.missing.pop()
            pool.retry_at = pool.deserted_at = None
        except OSError as error:
            self._try_later(pool, error)
        except BackendUnavailable as error:
            if not pool.members:
                self._give_up(f"stage {pool.line.name}: no worker can be started: {error}")

    def _try_later(self, pool: Pool, error: OSError) -> None:
        now = self._clock.monotonic()
        pool.retry_at = now + RETRY_SECONDS
        if pool.members:
            pool.deserted_at = None
        elif pool.deserted_at is None:
            pool.deserted_at = now
        elif now - pool.deserted_at >= DESERTED_SECONDS:
            self._give_up(
                f"stage {pool.line.name} has had no worker for {DESERTED_SECONDS:g} s: {describe_lack(error)}"
            )

    def _forget(self, member: Member) -> None:
        self._unwatch(member)
        member.pool.remove(member)
        member.worker.release()

    # ── work is given out ────────────────────────────────────────────────────

    def _dispatch(self, now: float) -> None:
        self._gave_at = now
        # Last stages first: what they take makes room for those before them.
        for pool in reversed(self._consumers):
            line = pool.line
            if line.delayed:
                self.scheduler.due(line, now)
            pool.call_at = None
            if line.ready:
                if line.rate is not None:
                    self._give_by_rate(pool, line.rate, now)
                elif line.batch is not None:
                    self._give_batches(pool, now)
                else:
                    self._give_chunks(pool)
            self._rebalance(pool, now)
            if pool.follows_consumers:
                self._say_if_it_starves(pool)
        if self.ending.level or (self._ahead == 1 and any(pool.line.flying for pool in self._consumers)):
            return
        for pool in self._producers:
            if pool.line.producing:
                self._grant(pool)

    def _say_if_it_starves(self, pool: Pool) -> None:
        """Tell the consumers before a stage not to keep what they have done, while nothing lies before it."""
        line = pool.line
        starves = not line.ready and line.flying <= line.lanes
        if starves != pool.starves:
            pool.starves = starves
            self._hint_upstream(line)

    def _give_chunks(self, pool: Pool) -> None:
        """Give chunks to workers that have nothing to do, then the next one to those that are busy."""
        line, lanes = pool.line, pool.line.each
        members = [member for member in pool.members if member.open and not member.recalled]
        free = [member for member in members if member.load < lanes]
        free.sort(key=_load)
        target = max(self._target(line), lanes)
        for place, member in enumerate(free):
            share = math.ceil(line.ready / (len(free) - place))
            if not share:
                return
            self._send(line, member, min(target, share))
        if self._ahead == 1 or self._failure_limit is not None:
            return  # where failures are counted, each is to be heard of before another job begins
        # A second chunk lets a worker go on without a pause, but must not be a crumb.
        if line.ready < max(1, target // 2) and not (line.ready and self.scheduler.upstream_quiet(line)):
            return
        for member in members:
            load = member.load
            if lanes <= load < lanes + target:
                share = math.ceil(line.ready / len(members))
                if not share or not self._send(line, member, min(target, share)):
                    break

    def _give_by_rate(self, pool: Pool, rate: float, now: float) -> None:
        """
        Give one call at a time to a free worker, evenly spaced: no call that did not happen is made up for.

        Nothing is given ahead: what lies at a worker begins when the worker likes.
        """
        line = pool.line
        lanes = line.batch or line.each
        free = [member for member in pool.members if member.open and not member.recalled]
        for member in sorted(free, key=_load):
            if member.load >= lanes or not line.ready:
                return
            if now < pool.next_call:
                pool.call_at = pool.next_call
                return
            if line.batch is not None and not self._is_ripe(line, now):
                return
            if not self._send(line, member, line.batch or 1):
                return
            late = now - pool.next_call
            pool.next_call = (pool.next_call if late < LATE_SECONDS else now) + 1 / rate

    def _is_ripe(self, line: Line, now: float) -> bool:
        """Whether a batch is full, or overdue, or no more can come: all has ended, or there is no room."""
        timeout = line.node.stage.consumer.batch_timeout
        return bool(
            line.groups
            or line.ready >= (line.batch or 1)
            or (line.oldest is not None and now >= line.oldest + timeout)
            or (line.ready and line.room_bytes <= 0 and line.promised <= 0)
            or self.scheduler.upstream_quiet(line)
        )

    def _give_batches(self, pool: Pool, now: float) -> None:
        """Give each free worker a batch that is full, or overdue, or the last."""
        line = pool.line
        batch = line.batch or 1
        for member in sorted(pool.members, key=_load):
            if not member.open or member.load:
                continue
            if not self._is_ripe(line, now) or not self._send(line, member, batch):
                break
            if line.oldest is not None:
                line.oldest = now

    def _send(self, line: Line, member: Member, limit: int) -> Chunk | None:
        if member.left is not None and line.batch is None:
            limit = min(limit, member.left)
        chunk = self.scheduler.take(line, member.worker.name, limit)
        if chunk is not None:
            if member.left is not None:
                member.left -= 1 if line.batch is not None else chunk.count
            member.worker.send(chunk)
            self._watch(member)
            pool = member.pool
            if pool.limit is not None and pool.look_at is None:
                pool.look_at = self._clock.monotonic() + pool.limit
        return chunk

    def _grant(self, pool: Pool) -> None:
        line = pool.line
        for member in pool.members:
            if not member.ready or member.worker.name in line.ended:
                continue
            while len(line.grants.get(member.worker.name, ())) < self._ahead:
                grant = self.scheduler.grant(line, member.worker.name)
                if grant is None:
                    break
                member.worker.send(grant)
                self._watch(member)

    def _rebalance(self, pool: Pool, now: float) -> None:
        """Take jobs back from behind a slow one while another worker has nothing to do."""
        name, line = pool.line.name, pool.line
        lanes = line.each
        startable = line.ready and self.scheduler.startable(line)  # else those in flight hold all the room
        if startable or line.flying <= lanes or len(pool.members) == 1:
            self._checks.pop(name, None)
            return
        if self._checks.get(name, 0.0) > now:
            return
        self._checks.pop(name, None)
        if not any(member.open and member.load < lanes for member in pool.members):
            return
        before = line.ready
        for member in pool.members:
            if not member.ready or member.load <= lanes or not member.has_more_to_give_back:
                continue
            if line.batch is not None and len(line.flights[member.worker.name]) == 1:
                continue  # one call: nothing lies behind it
            self._checks[name] = now + SLOW_SECONDS
            begun = member.begun()
            if not member.tickets() or begun != member.sample:
                member.sample, member.sampled_at = begun, now
            elif now - member.sampled_at >= SLOW_SECONDS:
                self._take_back(member)
        if line.ready > before:
            # Another worker may still be idle, and others have jobs to give back: the check stays.
            (self._give_batches(pool, now) if line.batch is not None else self._give_chunks(pool))

    def _enforce_limit(self, pool: Pool) -> None:
        """Stop workers whose jobs are over their time limit; look again when the next can be."""
        assert pool.limit is not None
        limit = round(pool.limit * 1e9)
        soonest, now = limit, self._clock.monotonic_ns()
        for member in pool.members:
            if member.overdue or not member.ready or not member.load:
                continue
            ages = member.ages(now)
            member.overdue = {ticket for ticket, age in ages if age >= limit}
            if member.overdue or member.loads_since(now) + limit <= now:
                member.worker.kill()
            soonest = min([soonest, *(limit - age for _, age in ages if age < limit)])
        busy = any(member.load for member in pool.members)
        pool.look_at = (now + max(soonest, 1_000_000)) / 1e9 if busy else None

    def _take_back(self, member: Member) -> None:
        line, name = member.pool.line, member.worker.name
        taken = self.scheduler.take_back(line, name, member.stop_beginning())
        member.recalled += taken
        if taken and member.left is not None:
            member.left += 1 if line.batch is not None else taken
        if not member.recalled:
            member.allow_all()

    def _take_all_back(self) -> None:
        for pool in self._consumers:
            for member in pool.members:
                if member.ready and not member.recalled:
                    self._take_back(member)

    # ── from and to a session ────────────────────────────────────────────────

    def _let_in(self, inlet: Entrance, now: float) -> None:
        """Queue what was submitted, and say how much more may come."""
        lines = self.scheduler.lines
        if not inlet.is_empty:
            for takers, block, roots in inlet.take():
                self.scheduler.submit([(lines[name], keys) for name, keys in takers], block, roots, now)
            self._tell_fates()
            self._report_happenings()
        for name in inlet.entries:
            line = lines[name]
            inlet.allow(name, max(0, line.room), max(0, line.room_bytes))

    def stats(self) -> dict[str, StageCounts]:
        """Return every stage's counts, with all that was submitted until now. In the driver's thread."""
        if self.inlet is not None and not self._closing:
            self._let_in(self.inlet, self._clock.monotonic())
        return self.counts()

    def pause(self) -> None:
        """Begin no new job from now on; those in hand go on. In the driver's thread."""
        self.paused = True
        self._take_all_back()

    def resume(self) -> None:
        """Begin jobs again. In the driver's thread."""
        self.paused = False

    def withdraw(self, root: int) -> bool:
        """Cancel a submitted item whose job has not begun; return whether it could be. Driver's thread."""
        if self.inlet is not None:
            self._let_in(self.inlet, self._clock.monotonic())
        if self.scheduler.withdraw(root):
            self._tell_fates()
            return True
        for pool in self._consumers:
            for member in pool.members:
                flights = pool.line.flights.get(member.worker.name, {})
                mine = any(root in (part.roots or ()) for one in flights.values() for part in one.chunk.parts)
                if mine and not member.recalled:
                    self._take_back(member)
        done = self.scheduler.withdraw(root)
        self._tell_fates()
        return done

    # ── the end ──────────────────────────────────────────────────────────────

    def _conclude(self, now: float) -> None:
        """Close the workers once there is nothing left for them to do."""
        scheduler = self.scheduler
        if self.ending.halted:
            if any(line.flying or line.producing for line in scheduler.lines.values()):
                return
        else:
            fed = self.inlet is not None and self.inlet.busy and not self.ending.level
            if fed or not scheduler.finished or self.sink.waitable is not None:
                return
        self._close(now)

    def _close(self, now: float) -> None:
        self._closing = True
        self.ending.deadline = min(self.ending.deadline, now + self._shutdown_timeout)
        for pool in self.pools.values():
            for member in pool.members:
                self._let_go(member)

    def _halt(self) -> None:
        """Start nothing new: jobs in progress finish, the rest will be cancelled."""
        self.ending.halted = True
        self.ending.since = self._clock.monotonic()
        for pool in self.pools.values():
            pool.stop_giving()
            for member in list(pool.members):
                if pool.line.is_producer:
                    self._let_go(member)
                else:
                    self._take_back(member)

    def _escalate(self, signal: int, now: float) -> None:
        ending = self.ending
        if ending.level == KILL:
            return  # there is no further step
        ending.level += 1
        ending.signal = ending.signal or signal or None
        if ending.level == FINISH:
            ending.since = now
            ending.deadline = now + self._shutdown_timeout
            for pool in self.pools.values():
                pool.stop_giving()
            for pool in self._producers:
                for member in pool.members:
                    self._let_go(member)
        reason = REASONS.get(signal, f"signal {signal}")
        workers = sum(len(pool.members) for pool in self.pools.values())
        # Where jobs run in this very thread nobody can end its wait when the time is over.
        limited = ending.level == FINISH and self._backend.own_thread
        seconds = max(0.0, ending.deadline - now) if limited else None
        self._tell(
            events.Stopping(ending.level, reason, self.scheduler.unfinished, workers=workers, seconds=seconds)
        )
        if ending.level >= STOP or (self._keeper is not None and not self._keeper.ready):
            self._stop_now()
        self._hopeless = ending.level >= KILL

    def _press(self, now: float) -> None:
        """While the run is being stopped, wait for nobody too long."""
        ending = self.ending
        if now >= ending.deadline and ending.level == FINISH:
            self._escalate(0, now)
        busy = any(line.flying for line in self.scheduler.lines.values())
        if not busy and now >= ending.since + PRODUCER_GRACE_SECONDS:
            for pool in self._producers:
                if pool.line.producing:
                    pool.stop("it did not come to its next yield")

    def _leave_off(self, now: float) -> None:
        """Begin nothing more; whoever has something in hand may finish it within a moment, and then close."""
        self.ending.level = STOP
        self._ends_at, self._waits_until = math.inf, now + LEAVING_SECONDS
        for pool in self.pools.values():
            pool.stop_giving()
        self._take_all_back()
        if self._keeper is not None and not self._keeper.ready:
            self._keeper.killed = True
            self._keeper.worker.kill()
        self._close(now)

    def _lose_patience(self) -> None:
        """Kill whoever has not ended by now; whoever was killed before is left to the backend."""
        self._hopeless = self.ending.killed
        if not self.ending.killed:
            for pool in self.pools.values():
                pool.stop(f"it did not end within {self._shutdown_timeout:g} s")
        self._kill_all()

    def _kill_the_busy(self) -> None:
        for pool in self.pools.values():
            for member in pool.members:
                gives = pool.line.is_producer and member.worker.name not in pool.line.ended
                if gives or member.load or not member.ready:
                    member.worker.kill()

    def _stop_now(self) -> None:
        """Stop jobs in flight; when every worker is gone, they and all that waits are cancelled."""
        self._closing = True
        self._kill_all()

    def _kill_all(self) -> None:
        self.ending.killed = True
        self._ends_at = math.inf
        self.ending.deadline = self._clock.monotonic() + KILL_GRACE_SECONDS
        for pool in self.pools.values():
            pool.stop_giving()  # a thread can't be killed, but its job may look
            pool.kill()
        if self._keeper is not None and (self._keeper.closing or not self._keeper.ready):
            self._keeper.killed = True
            self._keeper.worker.kill()

    def _give_up(self, why: str) -> None:
        if self.ending.gave_up is None:
            first, line, rest = why.partition("\n")
            left = counted(self.scheduler.unfinished, "job")
            unfinished = f"{first.rstrip(':')}; giving up, {left} unfinished"
            more = [pool.line.name for pool in self._producers if pool.line.producing]
            if more:
                unfinished += f", more to come from {', '.join(more)}"
            self.ending.gave_up = unfinished + line + rest
            self._stop_now()

    def _cancel_rest(self) -> None:
        # Three signals at once leave no time to hear what became of a producer.
        self.ending.interrupted |= any(pool.line.producing for pool in self._producers)
        lines = [pool.line for pool in self._consumers]
        while any(line.unsettled for line in lines):  # what an ordered stage held is cancelled at the next
            for line in lines:
                parts = self.scheduler.cancel(line, self._clock.monotonic())
                if parts:
                    self.ending.interrupted = True
                    self.cancelled.append(Cancelled(line.name, parts, self._unloadable.get(line.name, set())))
        self._pass_results()
        self._tell_fates()

    def _watch_sink(self) -> None:
        sink = self.sink
        sink.flush()
        if sink.broken is not None and not self._abandoned:
            self._abandoned = True  # nobody can have what is still to come
            if sink.broken:
                self.ending.gave_up = f"results can't be written: {sink.broken}"
        wanted = sink.waitable
        if wanted is self._sink_watched:
            return
        if self._sink_watched is not None:
            self._selector.unregister(self._sink_watched.fd)
        if wanted is not None:
            self._selector.register(wanted.fd, wanted.events, None)
        self._sink_watched = wanted

    def release(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self._leisure is not None:
            self._leisure.rest()
        for pool in self.pools.values():
            for member in list(pool.members):
                with contextlib.suppress(OSError, ValueError, KeyError):
                    self._unwatch(member)
        if self._keeper is not None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._unwatch(self._keeper)
        self._backend.close()
        if self._desk is not None:
            self._desk.close()
        self._selector.close()

    def close(self) -> None:
        """
        Close the descriptors that wake the loop; idempotent.

        Apart from `release`, and for the thread that made the driver: no other thread, and no signal handler,
        may still want to wake it, since by then the numbers may name somebody else's files.
        """
        if self._wake_read >= 0:
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1

    # ── the books ────────────────────────────────────────────────────────────

    def counts(self) -> dict[str, StageCounts]:
        """Return every stage's counts as they stand."""
        return {name: self._stage_counts(pool) for name, pool in self.pools.items()}

    def _stage_counts(self, pool: Pool) -> StageCounts:
        line, books = pool.line, pool.line.books
        lanes = line.each
        in_flight = 0 if line.is_producer else sum(min(lanes, member.load) for member in pool.members)
        return StageCounts(
            received=books.received,
            done=books.done,
            filtered=books.filtered,
            duplicates=books.duplicates,
            dead=books.dead,
            cancelled=books.cancelled,
            emitted=books.emitted,
            retried=books.retried,
            redelivered=books.redelivered,
            worker_restarts=pool.restarts,
            busy_seconds=books.busy_seconds,
            queued=line.queued + line.flying - in_flight,
            in_flight=in_flight,
            workers=len(pool.members),
        )

    def edges(self) -> list[EdgeCounts]:
        """Return what went along each edge: emitted by the workers' own count, received by the driver's."""
        return [
            EdgeCounts(
                source=edge.source,
                target=edge.target,
                emitted=_emitted(self.pools[edge.source], edge.route),
                received=edge.received,
            )
            for edge in self.scheduler.edges
        ]

    def imbalance(self) -> str | None:
        """Return how the driver's books differ from the workers' own counts; None: they balance."""
        problems = [problem for pool in self.pools.values() for problem in _compare(pool)]
        return "; ".join(problems) or None


def _load(member: Member) -> int:
    return member.load


def _emitted(pool: Pool, route: int) -> int:
    """Return how many items a stage's workers say they gave to a route, less those that came too late."""
    said = [*pool.totals, *(member.totals for member in pool.members)]
    late = pool.line.books.late_emitted.get(route, 0)
    return sum(one.emitted[route] for one in said if one.emitted) - late


def _compare(pool: Pool) -> Iterable[str]:
    line, books = pool.line, pool.line.books
    said = [*pool.totals, *(member.totals for member in pool.members)]
    pairs: Sequence[tuple[str, int, int]] = (
        ("done", books.done + books.late_done, sum(one.done for one in said)),
        (
            "filtered",
            books.filtered - books.duplicates + books.late_filtered,
            sum(one.filtered for one in said),
        ),
        ("failed", books.failed + books.late_failed, sum(one.failed for one in said)),
    )
    for what, ours, theirs in pairs:
        if ours != theirs:
            yield f"stage {line.name}: {ours} {what} by the driver's count, {theirs} by the workers'"
    settled = books.done + books.filtered + books.dead + books.cancelled
    if books.received != settled:
        yield f"stage {line.name}: received {books.received}, settled {settled}"
    for route, edges in enumerate(line.edges):
        emitted = _emitted(pool, route)
        for edge in edges:
            if emitted != edge.received:
                target = edge.target or "the results"
                yield f"{line.name} emitted {emitted} items to {target}, which received {edge.received}"
