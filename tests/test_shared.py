"""What a run's workers share: run-scoped resources, locks and semaphores, whoever dies."""

# ruff: noqa: ARG001  # jobs take items, resources and jobs that they need not look at

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobq import Job, JobqError, JobsFailed, Lock, PayloadError, Pipeline, PipelineError, RunFailed, Semaphore
from jobq.errors import BackendUnavailable
from jobq.locks import Book, Waiter
from tests.test_deaths import SURVIVAL, die, until
from tests.test_run import BACKENDS, ONE_OF_EACH, PROCESSES, Gate, Notes, ints, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ONE_OF_EACH)
def one_of_each(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


# --- run-scoped resources ------------------------------------------------------------------------


def empty() -> dict[Any, Any]:
    return {}


class Account:
    """Has methods, an attribute, and something that can't be pickled."""

    def __init__(self) -> None:
        self.balance = 0
        self._secret = 1

    def deposit(self, amount: int, *, times: int = 1) -> int:
        if amount < 0:
            raise Overdrawn(amount, "deposit")
        for _ in range(amount * times):  # not one step, unless somebody sees to that
            self.balance = self.balance + 1
        return self.balance

    def pid(self) -> int:
        return os.getpid()

    def thread(self) -> int:
        return threading.get_ident()

    def mutex(self) -> Any:
        return threading.Lock()


class Overdrawn(Exception):
    def __init__(self, amount: int, where: str) -> None:
        super().__init__(amount, where)


def test_all_workers_share_one_dict_list_and_number(backend: str) -> None:
    pipeline = ints(40)

    @pipeline.resource(scope="run")
    def seen() -> dict[int, str]:
        return {}

    @pipeline.resource(scope="run")
    def order() -> list[int]:
        return []

    @pipeline.resource(scope="run")
    def total() -> int:
        return 0

    @pipeline.consumer(workers=3)
    def work(i: int, seen: dict[int, str], order: list[int], total: Any) -> int:
        seen[i] = str(i)
        order.append(i)
        with Lock("total"):
            total.value += i
        return i

    @pipeline.consumer(batch=40, batch_timeout=60)
    def look(batch: list[int], seen: dict[int, str], order: list[int], total: Any) -> dict[str, Any]:
        del seen[0]
        return {
            "keys": sorted(seen),
            "order": sorted(order),
            "total": total.value,
            "in": (1 in seen, 0 in seen, 7 in order),
            "get": (seen.get(0, "none"), seen[39], sorted(seen.keys()) == sorted(seen)),
            "true": (bool(seen), len(order)),
            "equal": order == list(order),
            "text": str(total),
        }

    report = run(pipeline, backend)

    assert report.ok
    assert report.results == [
        {
            "keys": list(range(1, 40)),
            "order": list(range(40)),
            "total": 780,
            "in": (True, False, True),
            "get": ("none", "39", True),
            "true": (True, 40),
            "equal": True,
            "text": "780",
        }
    ]


def test_methods_run_one_at_a_time_where_the_object_is(backend: str) -> None:
    pipeline = ints(60)
    pipeline.resource(Account, name="account", scope="run")

    @pipeline.consumer(workers=3)
    def pay(i: int, account: Account) -> int:
        account.deposit(50, times=2)
        return os.getpid()

    @pipeline.consumer(batch=60, batch_timeout=60)
    def look(pids: list[int], account: Account) -> tuple[int, int, list[int]]:
        return account.balance, account.pid(), pids

    ((balance, keeper, workers),) = run(pipeline, backend).results

    assert balance == 60 * 100
    if backend in PROCESSES:
        assert keeper not in {*workers, os.getpid()}
    else:
        assert keeper == os.getpid()


def test_what_a_method_raises_comes_back_as_itself(one_of_each: str) -> None:
    pipeline = ints(1)
    pipeline.resource(Account, name="account", scope="run")

    @pipeline.consumer
    def pay(i: int, account: Account) -> None:
        account.deposit(-5)

    with pytest.raises(JobsFailed) as caught:
        pipeline.run(backend=one_of_each)

    (error,) = caught.value.exceptions
    assert isinstance(error, Overdrawn)
    assert error.args == (-5, "deposit")
    assert "in deposit" in caught.value.report.dead[0].traceback


def test_what_can_not_leave_its_process_is_an_error_that_says_so() -> None:
    pipeline = ints(1)
    pipeline.resource(Account, name="account", scope="run")

    @pipeline.consumer
    def look(i: int, account: Account) -> list[str]:
        said = []
        for wrong in (account.mutex, lambda: account._secret, lambda: account.missing, lambda: account[0]):  # type: ignore[attr-defined, index]
            try:
                wrong()
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        return said

    ((mutex, secret, missing, item),) = run(pipeline, "pipe").results

    assert mutex.startswith(f"{PayloadError.__name__}: what account.mutex gives cannot be pickled")
    assert secret.endswith("is not public")
    assert missing == "AttributeError: 'Account' object has no attribute 'missing'"
    assert item == "TypeError: 'Account' object is not subscriptable"


def test_attributes_can_be_read_and_set_and_a_value_that_it_has_is_its_own(one_of_each: str) -> None:
    pipeline = ints(1)
    pipeline.resource(lambda: SimpleNamespace(value=1, other=2), name="both", scope="run")

    @pipeline.consumer
    def work(i: int, both: Any) -> tuple[int, int]:
        both.value += 10
        both.other = both.value
        return both.value, both.other

    assert run(pipeline, one_of_each).results == [(11, 11)]


def test_it_is_opened_once_and_closed_after_all_workers(backend: str, notes: Notes) -> None:
    pipeline = ints(20)

    @pipeline.resource(scope="run")
    def base(start: int = 5) -> Iterator[dict[str, int]]:
        notes.add("open base")
        yield {"start": start}
        notes.add("close base")

    @pipeline.resource(scope="run")
    def store(base: dict[str, int]) -> Iterator[list[int]]:
        notes.add("open store")
        held = [base["start"]]
        yield held
        notes.add(f"close store {len(held)}")

    @pipeline.resource
    def mine(store: list[int]) -> Iterator[list[int]]:
        yield store
        store.append(-1)
        notes.add("close mine")

    @pipeline.consumer(workers=2)
    def work(i: int, mine: list[int], store: list[int]) -> None:
        store.append(i)
        assert mine == store

    report = run(pipeline, backend, start=7)

    assert report.ok
    lines = notes.lines()
    users = lines.count("close mine")
    assert 1 <= users <= 2
    assert lines == [
        "open base",
        "open store",
        *["close mine"] * users,
        f"close store {21 + users}",
        "close base",
    ]


def test_what_no_stage_needs_is_not_opened(one_of_each: str, notes: Notes) -> None:
    pipeline = ints(3)

    @pipeline.resource(scope="run")
    def unused() -> dict[str, int]:
        notes.add("open")
        return {}

    @pipeline.consumer
    def work(i: int) -> None: ...

    assert run(pipeline, one_of_each).ok
    assert notes.lines() == []


def test_a_producer_and_a_session_have_it_too(backend: str) -> None:
    pipeline = Pipeline("test")
    pipeline.resource(empty, name="box", scope="run")

    @pipeline.producer
    def start(box: dict[str, int]) -> Iterator[int]:
        box["from"] = 1
        yield 1

    @pipeline.consumer
    def look(i: int, box: dict[str, int]) -> dict[str, int]:
        box[str(i)] = i
        return dict(box.items())

    assert run(pipeline, backend).results == [{"from": 1, "1": 1}]
    with pipeline.open(backend=backend) as session:
        assert session.submit(2).result() == {"2": 2}
        assert session.submit(3).result() == {"2": 2, "3": 3}


def test_leaving_a_stream_early_closes_it(backend: str, notes: Notes) -> None:
    pipeline = ints(10_000)

    @pipeline.resource(scope="run")
    def box() -> Iterator[dict[str, int]]:
        yield {}
        notes.add("closed")

    @pipeline.consumer
    def work(i: int, box: dict[int, int]) -> int:
        box[i] = i
        return i

    with pipeline.stream(backend=backend) as results:
        next(results)

    assert notes.lines() == ["closed"]


def test_one_that_can_not_be_opened_ends_the_run_before_any_job(one_of_each: str, notes: Notes) -> None:
    pipeline = ints(3)

    @pipeline.resource(scope="run")
    def broken() -> dict[str, int]:
        raise ValueError("no such place")

    @pipeline.consumer
    def work(i: int, broken: dict[str, int]) -> None:
        notes.add(i)

    reason = r"could not go on: .*no such place, while opening the resource broken\(\) \(.*\.py:\d+\);"
    with pytest.raises(RunFailed, match=f"keeper of the run-scoped resources {reason}"):
        pipeline.run(backend=one_of_each)

    assert notes.lines() == []


@pytest.mark.parametrize("scope", ["run", "worker"])
def test_one_that_can_not_be_closed_is_not_hidden(one_of_each: str, scope: str) -> None:
    pipeline = ints(3)

    @pipeline.resource(scope="run")
    def kept() -> Iterator[dict[str, int]]:
        yield {}

    @pipeline.resource(scope=scope)
    def leaky() -> Iterator[dict[str, int]]:
        yield {}
        raise ValueError("not written")

    @pipeline.consumer
    def work(i: int, leaky: dict[str, int], kept: dict[str, int]) -> None: ...

    failure = r"not written, while closing the resource leaky\(\) \(.*\.py:\d+\)"
    with pytest.raises(RunFailed, match=failure) as caught:
        pipeline.run(backend=one_of_each)

    assert caught.value.report is not None
    assert caught.value.report.stages["work"].done == 3


def test_a_keeper_that_can_not_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    pipeline = ints(1)

    @pipeline.resource(scope="run")
    def shared() -> dict[str, int]:
        return {}

    @pipeline.consumer
    def work(i: int, shared: dict[str, int]) -> None: ...

    monkeypatch.setattr("jobq.backends.processes.ProcessBackend.start", refuse)
    with pytest.raises(BackendUnavailable, match="keeper of the run-scoped resources: no worker can"):
        pipeline.run(backend="pipe")


PROGRAM = """
import os, signal, time
from jobq import Pipeline

pipeline = Pipeline("keeper")

class Account:
    def pid(self) -> int:
        return os.getpid()

@pipeline.producer
def numbers() -> list[int]:
    return [1]

@pipeline.resource(scope="run")
def account() -> Account:
    return Account()

@pipeline.consumer
def work(i: int, account: Account) -> None:
    print(account.pid(), flush=True)
    {act}
"""


def test_the_keeper_dies_with_the_driver(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.py"
    file.write_text(PROGRAM.format(act="time.sleep(60)"))
    with subprocess.Popen(
        [sys.executable, "-m", "jobq.cli", "run", str(file)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as driver:
        assert driver.stdout is not None
        keeper = os.pidfd_open(int(driver.stdout.readline()))

        driver.kill()

        try:
            assert _readable(keeper, SURVIVAL)
        finally:
            os.close(keeper)


def _readable(fd: int, seconds: float) -> bool:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def test_one_for_the_run_can_not_need_one_of_each_worker() -> None:
    pipeline = ints(1)

    @pipeline.resource
    def connection() -> int:
        return 1

    @pipeline.resource(scope="run")
    def cache(connection: int) -> dict[str, int]:
        return {}

    @pipeline.consumer
    def work(i: int, cache: dict[str, int]) -> None: ...

    with pytest.raises(PipelineError, match=r"cache\(\).* needs connection\(\).*scope=.run"):
        pipeline.check()


# --- locks ---------------------------------------------------------------------------------------


def _count_down(kill_at: int | None) -> Pipeline:
    pipeline = ints(100)
    pipeline.resource(lambda: {"count": 100}, name="shared", scope="run")

    @pipeline.consumer(workers=4)
    def take(i: int, shared: dict[str, int], job: Job) -> int:
        with Lock("count"):
            if i == kill_at and job.delivery == 1:
                _leave_a_child()
                die()
            left = shared["count"] - 1
            shared["count"] = left
            return left

    return pipeline


def _leave_a_child() -> None:
    """Leave a child behind that holds all our descriptors until the end of the run."""
    nursery = os.pidfd_open(os.getppid())
    if os.fork() == 0:
        _readable(nursery, 30)
        os._exit(0)


def test_a_hundred_jobs_count_down_from_a_hundred_to_nought(backend: str) -> None:
    assert sorted(run(_count_down(None), backend).results) == list(range(100))


@pytest.mark.parametrize("backend", PROCESSES)
def test_a_lock_is_released_when_its_holder_is_killed_though_its_child_lives(backend: str) -> None:
    report = run(_count_down(50), backend)

    assert sorted(report.results) == list(range(100))
    assert report.stages["take"].redelivered >= 1
    assert report.stages["take"].worker_restarts == 1


def by_spawn_numbers() -> Iterator[int]:
    yield from range(30)


def by_spawn_shared() -> dict[str, int]:
    return {"count": 30}


def by_spawn_take(i: int, shared: dict[str, int], job: Job) -> int:
    with Lock("count"):
        if i == 10 and job.delivery == 1:
            die()
        shared["count"] -= 1
        return shared["count"]


@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_it_is_the_same_with_every_start_method(start_method: str) -> None:
    pipeline = Pipeline("test")
    pipeline.producer(by_spawn_numbers)
    pipeline.resource(by_spawn_shared, name="shared", scope="run")
    pipeline.consumer(by_spawn_take, workers=2)

    report = run(pipeline, "pipe", start_method=start_method)

    assert sorted(report.results) == list(range(30))


@pytest.mark.parametrize("backend", PROCESSES)
def test_the_turn_of_one_who_dies_waiting_goes_to_the_next(backend: str, notes: Notes, gate: Gate) -> None:
    pipeline = ints(3)

    def killed_while_waiting(*_: object) -> None:
        with gate.path.open("w"):  # whoever holds it may go on
            die()

    @pipeline.consumer(workers=3)
    def work(i: int, job: Job) -> int:
        if i == 0:
            with Lock("x"):
                notes.add("held")
                gate.wait()
        else:
            until(lambda: "held" in notes.lines())
            if i == 1 and job.delivery == 1:
                # While it waits; were it sooner, nothing would change for the test.
                signal.signal(signal.SIGALRM, killed_while_waiting)
                signal.setitimer(signal.ITIMER_REAL, 0.05)
            with Lock("x"):
                notes.add(f"got {i}")
        return i

    report = run(pipeline, backend)

    assert sorted(report.results) == [0, 1, 2]
    assert sorted(notes.lines()[1:]) == ["got 1", "got 2"]


def test_a_semaphore_lets_three_in_and_no_fourth(backend: str, notes: Notes) -> None:
    together = 1 if backend == "inline" else 3
    pipeline = ints(30)
    pipeline.resource(lambda: {"inside": 0, "most": 0}, name="seen", scope="run")

    @pipeline.consumer(workers=5)
    def work(i: int, seen: dict[str, int]) -> int:
        with Semaphore("room", 3):
            with Lock("seen"):
                seen["inside"] += 1
                seen["most"] = most = max(seen["most"], seen["inside"])
            until(lambda: seen["most"] >= together)
            with Lock("seen"):
                seen["inside"] -= 1
        return most

    report = run(pipeline, backend)

    assert report.ok
    assert max(report.results) == together


def test_the_threads_of_a_worker_exclude_each_other(one_of_each: str) -> None:
    pipeline = ints(60)
    pipeline.resource(lambda: 0, name="total", scope="run")

    @pipeline.consumer(workers=2, concurrency=3)
    def work(i: int, total: Any) -> int:
        def add() -> None:
            with Lock("total"):
                total.value += 1

        add()
        one_more = threading.Thread(target=add)
        one_more.start()
        one_more.join()
        return i

    @pipeline.consumer(batch=60, batch_timeout=60)
    def look(batch: list[int], total: Any) -> int:
        return int(total.value)

    report = run(pipeline, one_of_each)

    assert report.ok
    assert report.results == [120]


@pytest.mark.parametrize("backend", ["pipe", "thread"])
def test_coroutines_wait_without_stopping_each_other(backend: str) -> None:
    pipeline = ints(20)
    pipeline.resource(lambda: 0, name="total", scope="run")

    @pipeline.consumer(workers=2, concurrency=4)
    async def work(i: int, total: Any) -> int:
        async with Lock("total"):
            before = total.value
            await asyncio.sleep(0.001)  # others run, and must not get in
            total.value = before + 1
        return i

    @pipeline.consumer(batch=20, batch_timeout=60)
    def look(batch: list[int], total: Any) -> int:
        return int(total.value)

    report = run(pipeline, backend)

    assert report.ok
    assert report.results == [20]


@pytest.mark.parametrize("backend", ["pipe", "thread"])
def test_acquire_with_a_timeout_gives_up_and_then_waits_its_turn(backend: str, gate: Gate) -> None:
    pipeline = ints(2)
    pipeline.resource(empty, name="seen", scope="run")

    @pipeline.consumer(workers=2)
    def work(i: int, seen: dict[str, bool]) -> list[bool]:
        if i == 0:
            with Lock("x"):
                seen["held"] = True
                gate.wait()
            return []
        until(lambda: "held" in seen)
        lock = Lock("x")
        tries = [lock.acquire(timeout=0), lock.acquire(timeout=0.01)]
        gate.open()
        tries.append(lock.acquire())
        lock.release()
        gate.close()
        return tries

    assert sorted(run(pipeline, backend).results) == [[], [False, False, True]]


def test_misuse_is_an_error_and_never_a_hang(backend: str) -> None:
    pipeline = ints(1)

    @pipeline.consumer
    def work(i: int) -> list[str]:
        def twice() -> None:
            with Lock("x"), Lock("x"):
                pass

        def two_sizes() -> None:
            with Semaphore("s", 2), Semaphore("s", 3):
                pass

        said = []
        for wrong in (twice, Lock("y").release, two_sizes):
            try:
                wrong()
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        with Semaphore("z", 2), Semaphore("z", 2):
            return said

    ((twice_held, not_held, other_n),) = run(pipeline, backend).results
    assert twice_held.startswith("RuntimeError: Lock('x'): this thread holds it, and would wait for itself")
    assert not_held == "RuntimeError: the lock 'y' is released by a worker that doesn't hold it"
    assert other_n == "ValueError: the semaphore 's' is in use with n=2; here n=3"


def test_outside_a_run_there_is_nobody_to_ask(backend: str) -> None:
    for _ in range(2):
        with pytest.raises(JobqError, match=r"Lock\('x'\) can be used only while a pipeline runs"), Lock("x"):
            pass
        pipeline = ints(3)
        pipeline.resource(empty, name="box", scope="run")

        @pipeline.consumer
        def work(i: int, box: dict[str, int]) -> Any:
            with Lock("x"):
                return box

        box = run(pipeline, backend).results[0]
        assert repr(box) == "<run-scoped box>"
        with pytest.raises(JobqError, match="run-scoped resource 'box' can be used only while"):
            len(box)


@pytest.mark.parametrize(("name", "n"), [("", 1), (5, 1), ("x", 0), ("x", 1.5)])
def test_a_semaphore_has_a_name_and_a_number(name: Any, n: Any) -> None:
    with pytest.raises(ValueError, match="semaphore"):
        Semaphore(name, n)


def test_locks_can_be_made_anywhere_and_travel(backend: str) -> None:
    lock = Lock("x")
    pipeline = Pipeline("test")

    @pipeline.producer
    def give() -> Iterator[Lock]:
        with Lock("y"):
            yield lock

    @pipeline.consumer
    def take(given: Lock) -> str:
        with given, Semaphore("x", 1):  # of the same name, but another thing
            return given.name

    assert run(pipeline, backend).results == ["x"]
    assert pickle.loads(pickle.dumps(lock)).name == "x"


def test_two_runs_have_locks_of_their_own() -> None:
    def hold(ready: Callable[[], None]) -> Pipeline:
        pipeline = ints(1)

        @pipeline.consumer
        def work(i: int) -> None:
            with Lock("x"):
                ready()

        return pipeline

    def other() -> None:  # with the first one's lock this would wait for ever
        assert run(hold(lambda: None), "thread").ok

    assert run(hold(other), "thread").ok
    assert run(hold(lambda: None), "inline").ok


@pytest.mark.parametrize("inner", ["inline", "thread", "pipe"])
@pytest.mark.parametrize("outer", ["inline", "pipe"])
def test_a_job_that_runs_a_pipeline_finds_its_own_lock_again(outer: str, inner: str) -> None:
    pipeline = ints(2)
    pipeline.resource(empty, name="box", scope="run")

    @pipeline.consumer(daemon=False)
    def work(i: int, box: dict[int, int]) -> bool:
        with Lock("x"):
            nested = ints(1)

            @nested.consumer
            def deep(i: int) -> bool:
                with Lock("x"):
                    return True

            given = nested.run(backend=inner, collect=True).results
            box[i] = i
            return given == [True]

    assert run(pipeline, outer).results == [True, True]


@pytest.mark.parametrize("backend", PROCESSES)
def test_a_process_that_a_job_starts_asks_in_its_own_name(backend: str) -> None:
    pipeline = ints(1)
    pipeline.resource(lambda: 0, name="total", scope="run")

    @pipeline.consumer(daemon=False)
    def work(i: int, total: Any) -> tuple[int, bool]:
        with Lock("x"):
            total.value += 1
            if (pid := os.fork()) == 0:
                total.value += 1
                with Lock("y"):
                    os._exit(int(Lock("x").acquire(timeout=0)))
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0  # it didn't get what we hold
        return total.value, Lock("y").acquire(timeout=20)  # which was released by its death

    assert run(pipeline, backend).results == [(2, True)]


def test_threads_of_a_stopped_run_wait_for_no_lock(notes: Notes, gate: Gate) -> None:
    pipeline = ints(2)

    @pipeline.consumer(workers=2)
    def work(i: int) -> None:
        try:
            notes.add("asks")
            Lock("x").acquire()
            notes.add("holds")
            gate.wait()
        except JobqError:
            notes.add("gave up")

    with pipeline.open(backend="thread") as session:
        for i in range(2):
            session.submit(i)
        until(lambda: sorted(notes.lines()) == ["asks", "asks", "holds"])
        session.stop()
    until(lambda: "gave up" in notes.lines())

    gate.open()  # and the holder ends too, as the fixture sees


def test_a_run_without_run_scoped_resources_has_no_keeper(notes: Notes) -> None:
    pipeline = ints(1)

    @pipeline.consumer
    def work(i: int) -> list[str]:
        children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children")
        until(lambda: len(children.read_text().split()) >= 3)
        with Lock("x"):
            return children.read_text().split()

    (children,) = run(pipeline, "pipe").results

    assert len(children) == 3  # the producer, this one, and the nursery's spare


# --- the book ------------------------------------------------------------------------------------


def test_the_book_grants_in_the_order_of_asking() -> None:
    book, granted = Book(), list[str]()

    def ask(holder: str, limit: int = 2) -> Waiter:
        waiter = Waiter("s", holder, lambda: granted.append(holder))
        book.ask(waiter, limit)
        return waiter

    a, _, c, *_ = [ask(name) for name in "abcde"]

    assert granted == ["a", "b"]
    assert not book.withdraw(a)
    assert book.withdraw(c)
    book.release("s", "b")
    assert granted == ["a", "b", "d"]
    book.gone("a")
    assert granted == ["a", "b", "d", "e"]
    with pytest.raises(RuntimeError, match="doesn't hold"):
        book.release("s", "a")
    book.gone("d")
    book.release("s", "e")
    ask("f", limit=1)  # nobody holds it: it may be another now
    assert granted[-1] == "f"
