"""Several jobs in progress at once in one worker: threads for ``def``, tasks for ``async def``."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from jobq.backend import LANES, Port, may_begin, past
from jobq.errors import PayloadError, TimeLimitExceeded
from jobq.failure import failure_of, refusal
from jobq.locks import inside
from jobq.outbox import DONE, FAILED, FILTERED, Counters, Flusher, Marker, survive_forks
from jobq.wire import Answer, Chunk, Failure, Order, Output, PackedObjects, Part
from jobq.work import (
    Caller,
    Intake,
    StageRecipe,
    check_limit,
    encode_carefully,
    outcome_of,
    place_of,
    places,
    read_giving,
    retirement_of,
)

#: After a flush, what ends within this many seconds waits for the flusher's next look.
LINGER_SECONDS = 0.001
#: Stands for an item that its job opens.
UNOPENED = Marker("UNOPENED")
#: Stands for a job that was taken back before it began.
RECALLED = Marker("RECALLED")


@dataclass(slots=True)
class LaneTally:
    """The outcomes of one chunk, in the order in which jobs ended."""

    number: int
    open: int
    chunk: Chunk
    outcomes: list[tuple[int, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    busy: float = 0.0
    skipped: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Task:
    """One job on its way to a lane."""

    tally: LaneTally
    index: int
    offset: int
    part: Part
    item: Any
    batch: tuple[int, ...] = ()  # the indices of all jobs of a batch, whose items *item* lists


class Lanes:
    """What both kinds of lanes share: jobs come in by chunks, outcomes leave as they come."""

    def __init__(self, recipe: StageRecipe, port: Port) -> None:
        self._recipe = recipe
        self._port = port
        self._page = port.page
        self._giving = read_giving(recipe, port.codec)
        self._retirement = retirement_of(recipe, port)
        self._intake = Intake(recipe, port, self._retirement)
        self._retry_on = recipe.stage.consumer.retry_on
        self._timeout = recipe.stage.consumer.timeout
        self._lock = threading.Lock()
        self._tallies: dict[int, LaneTally] = {}
        self._counters = Counters(emitted=[0] * len(recipe.routes))
        self._flushed = 0.0
        self._current = threading.local()
        self._flusher = Flusher(self.flush, lambda: bool(self._tallies)) if recipe.flusher else None
        survive_forks(self)

    def renew(self) -> None:
        """Be usable in a copy of the process, whose only thread is the one that forked."""
        self._lock = threading.Lock()
        if self._flusher is not None:
            self._flusher.renew()

    def run(self, order: Order) -> None:
        """Hand a chunk's jobs to the lanes; they answer."""
        assert isinstance(order, Chunk)
        if self._retirement.why:
            with self._lock:
                self._port.send(Answer(order.number, True, totals=self._counters.totals()))
            return
        items, bad = self._open_chunk(order)
        tally = LaneTally(order.number, order.count, order)
        with self._lock:
            self._tallies[order.number] = tally
        if self._flusher is not None:
            self._flusher.arm()
        good: list[Task] = []
        for index, (item, (part, offset)) in enumerate(zip(items, places(order), strict=True)):
            if index in bad:
                self._end(tally, index, FAILED, refusal(index, bad[index], item))
            else:
                good.append(Task(tally, index, offset, part, item))
        if self._recipe.signature.batched and good:
            indices = tuple(task.index for task in good)
            good = [replace(good[-1], item=[task.item for task in good], batch=indices)]
        for task in good:
            self._begin(task)

    def _open_chunk(self, order: Chunk) -> tuple[list[Any], dict[int, str]]:
        """
        Return a chunk's items, `UNOPENED` where its jobs open them as they begin.

        What is opened can't be given back: a socket comes out of its pickle once, and the job may still be
        taken back.
        """
        alone = not self._recipe.signature.batched
        if alone and all(isinstance(part.block, PackedObjects) for part in order.parts):
            return [UNOPENED] * order.count, {}
        return self._intake.open(order)

    def _opened(self, task: Task) -> Task | None:
        """Return *task* with its item; None if it is not what the stage takes: then the job has failed."""
        if task.item is not UNOPENED:
            return task
        item, problem = self._intake.open_one(task.part, task.offset)
        if problem is None:
            return replace(task, item=item)
        self._end(task.tally, task.index, FAILED, refusal(task.index, problem, item))
        return None

    def _conclude(self, task: Task, outcome: Any, error: BaseException | None, busy: float) -> None:
        """Write down how a call ended: one job, or all jobs of a batch."""
        if outcome is not RECALLED:
            self._retirement.note(error.__cause__ if isinstance(error, PayloadError) else error)
            self._retirement.look(now := time.monotonic_ns(), now - int(busy * 1e9))
        for index in task.batch or (task.index,):
            last = index == task.index
            item = task.item[task.batch.index(index)] if task.batch else task.item
            failed = error is not None and outcome_of(error) is FAILED
            failure = self._failure(task, index, error, item) if failed and error else None
            given = outcome if last or outcome in (FAILED, FILTERED, RECALLED) else DONE
            self._end(task.tally, index, given, failure, busy if last else 0.0)

    def _failure(self, task: Task, index: int, error: BaseException, item: Any) -> Failure:
        item = self._intake.original(*place_of(task.tally.chunk, index), item)
        return failure_of(index, error, item, self._retry_on, self._intake.form)

    def _begin(self, task: Task) -> None:
        raise NotImplementedError

    def _may_begin(self, lane: int, task: Task) -> bool:
        """Write the job down as begun in *lane*, unless it was taken back or this worker is retiring."""
        ticket = task.tally.number + (task.batch[0] if task.batch else task.index)
        before = self._page[LANES + 2 * lane]
        self._page[LANES + 2 * lane + 1] = time.monotonic_ns()
        self._page[LANES + 2 * lane] = ticket
        if may_begin(self._page, ticket) and not self._retirement.why:
            return True
        self._page[LANES + 2 * lane] = before
        return False

    def _outcome(self, given: Any) -> Any:
        """Return what a call gave as an outcome: a marker, or the list of its pieces."""
        signature = self._recipe.signature
        if self._giving.ignore:
            return DONE
        if signature.many:
            return [
                encode_carefully(self._giving, item, self._recipe)
                for item in (given if given is not None else ())
                if item is not None  # a generator's None is not given on
            ]
        if given is None and signature.nullable:
            return FILTERED
        return [encode_carefully(self._giving, given, self._recipe)]

    def _end(
        self, tally: LaneTally, index: int, outcome: Any, failure: Failure | None = None, busy: float = 0.0
    ) -> None:
        """Write down how a job ended, and send it unless something was sent just now."""
        with self._lock:
            tally.open -= 1
            tally.busy += busy
            if outcome is RECALLED:
                tally.skipped.append(index)
            else:
                tally.outcomes.append((index, outcome))
            if failure is not None:
                tally.failures.append(failure)
            if tally.open == 0 or time.monotonic() - self._flushed > LINGER_SECONDS:
                self._flush_locked()
            elif self._flusher is not None:
                self._flusher.arm()  # it may have fallen asleep since the chunk came

    def flush(self) -> bool:
        """Send what the jobs that have ended gave; return whether there was anything."""
        with self._lock:
            return self._flush_locked()

    def _flush_locked(self) -> bool:
        sent = False
        for tally in list(self._tallies.values()):
            if tally.outcomes or tally.notes or tally.skipped or tally.open == 0:
                self._port.send(self._answer(tally))
                sent = True
        self._flushed = time.monotonic()
        return sent

    def _answer(self, tally: LaneTally) -> Answer:
        if tally.open == 0:
            del self._tallies[tally.number]
        outcomes, tally.outcomes = sorted(tally.outcomes, key=lambda ended: ended[0]), []
        failures, tally.failures = tuple(tally.failures), []
        notes, tally.notes = tuple(tally.notes), []
        busy, tally.busy = tally.busy, 0.0
        skipped, tally.skipped = tuple(tally.skipped), []
        settled: list[tuple[int, int]] = []
        filtered: list[int] = []
        pieces: list[Any] = []
        parents: list[int] = []
        for index, outcome in outcomes:
            if outcome is FAILED:
                continue
            settled.append((index, index + 1))
            if outcome is FILTERED:
                filtered.append(index)
            elif outcome is not DONE:
                pieces += outcome
                parents += [index] * len(outcome)
        outputs: tuple[Output, ...] = self._giving.packer.outputs(pieces, parents)
        counters = self._counters
        counters.done += len(settled) - len(filtered)
        counters.filtered += len(filtered)
        counters.failed += len(failures)
        for output in outputs:
            counters.emitted[output.route] += output.block.count
        return Answer(
            tally.number,
            tally.open == 0,
            tuple(settled),
            tuple(filtered),
            failures,
            outputs,
            counters.totals(),
            busy,
            notes=notes,
            skipped=skipped,
            leaving=self._retirement.why,
        )

    def _close_flusher(self) -> None:
        if self._flusher is not None:
            self._flusher.close()


class ThreadLanes(Lanes):
    """Each lane is a thread, with resources of its own."""

    def __init__(self, recipe: StageRecipe, port: Port) -> None:
        super().__init__(recipe, port)
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def run(self, order: Order) -> None:
        """Hand a chunk's jobs to the threads; raises what opening a thread's resources raised."""
        if not self._threads:
            self._start()
        super().run(order)

    def _start(self) -> None:
        for lane in range(self._recipe.lanes):
            thread = threading.Thread(target=self._work, args=(lane,), name=f"jobq-lane-{lane}", daemon=True)
            thread.start()
            self._threads.append(thread)
        for error in [self._ready.get() for _ in self._threads]:
            if error is not None:
                raise error

    def _begin(self, task: Task) -> None:
        self._tasks.put(task)

    def _work(self, lane: int) -> None:
        with inside(self._recipe.place):
            self._work_inside(lane)

    def _work_inside(self, lane: int) -> None:
        caller = Caller(self._recipe, self._port, lambda: getattr(self._current, "tally", None))
        try:
            caller.prepare()
        except BaseException as error:  # user code: the worker's main thread tells the driver
            self._ready.put(error)
            return
        self._ready.put(None)
        try:
            while (task := self._tasks.get()) is not None:
                self._do(lane, caller, task)
        finally:
            caller.close()

    def _do(self, lane: int, caller: Caller, task: Task) -> None:
        if not self._may_begin(lane, task):
            self._conclude(task, RECALLED, None, 0.0)
            return
        self._do_opened(caller, self._opened(task))
        self._page[LANES + 2 * lane] = past(self._page[LANES + 2 * lane])

    def _do_opened(self, caller: Caller, task: Task | None) -> None:
        if task is None:
            return
        self._current.tally = task.tally
        began = time.monotonic()
        raised = None
        try:
            job = caller.job(task.part, task.index, task.offset) if caller.wants_job else {}
            outcome = self._outcome(caller.function(task.item, **job))
            check_limit(self._timeout, int(began * 1e9))
        except BaseException as error:  # the job's, whatever it is
            outcome, raised = outcome_of(error), error
        self._conclude(task, outcome, raised, time.monotonic() - began)

    def close(self) -> None:
        """End the threads once they have done what they were given."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._close_flusher()


class AsyncLanes(Lanes):
    """Each lane is a task on one event loop, which runs in a thread of its own."""

    def __init__(self, recipe: StageRecipe, port: Port) -> None:
        super().__init__(recipe, port)
        self._tally: LaneTally | None = None
        self._caller = Caller(recipe, port, lambda: self._tally, self._run_there)
        self._free = list(range(recipe.lanes))
        self._waiting: deque[Task] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="jobq-loop", daemon=True)
        self._thread.start()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def run(self, order: Order) -> None:
        """Hand a chunk's jobs to the event loop."""
        self._caller.prepare()
        super().run(order)

    def _run_there(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Return what *coroutine* returns on the event loop; raises what it raises."""

        async def run() -> tuple[Any, BaseException | None]:
            try:
                return await coroutine, None
            except BaseException as error:  # user code: SystemExit would end the loop
                return None, error

        given, error = asyncio.run_coroutine_threadsafe(run(), self._loop).result()
        if error is not None:
            raise error
        return given

    def _begin(self, task: Task) -> None:
        self._loop.call_soon_threadsafe(self._admit, task)

    def _admit(self, task: Task) -> None:
        self._waiting.append(task)
        self._fill()

    def _fill(self) -> None:
        while self._free and self._waiting:
            task = self._waiting.popleft()
            lane = self._free.pop()
            if not self._may_begin(lane, task):
                self._free.append(lane)
                self._conclude(task, RECALLED, None, 0.0)
                continue
            running = self._loop.create_task(self._do(lane, task))
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    async def _do(self, lane: int, task: Task) -> None:
        opened = self._opened(task)
        if opened is not None:
            await self._do_opened(opened)
        self._page[LANES + 2 * lane] = past(self._page[LANES + 2 * lane])
        self._free.append(lane)
        self._fill()

    async def _do_opened(self, task: Task) -> None:
        began = time.monotonic()
        raised: BaseException | None = None
        try:
            job = self._caller.job(task.part, task.index, task.offset) if self._caller.wants_job else {}
            async with asyncio.timeout(self._timeout) as limit:
                outcome = self._outcome(await self._called(self._caller.function, task.item, job))
        except TimeoutError as error:
            late = TimeLimitExceeded(f"the job took longer than {self._timeout:g} s")
            outcome, raised = FAILED, late if limit.expired() else error
        except BaseException as error:  # the job's, whatever it is
            outcome, raised = outcome_of(error), error
        self._conclude(task, outcome, raised, time.monotonic() - began)

    async def _called(self, function: Callable[..., Any], item: Any, job: dict[str, Any]) -> Any:
        given = function(item, **job)
        if hasattr(given, "__aiter__"):
            return [one async for one in given]
        return await given

    def close(self) -> None:
        """End the loop once everything that it was given has ended."""
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result()
        try:
            self._caller.close()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._close_flusher()

    async def _drain(self) -> None:
        while self._waiting or self._running:
            await asyncio.wait(self._running)
