"""
The contract of a backend, as a test that any implementation can be held to.

    from jobq.testing import check_backend

    def test_my_backend_holds_the_contract():
        check_backend(MyBackend)
"""

from __future__ import annotations

import importlib
import os
import select
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

from jobq.backend import LANES, LIMIT, Backend, Plan, Port, Worker
from jobq.errors import BrokenChannel, EndOfChannel
from jobq.wire import Answer, Bye, Chunk, Grant, Hello, Order, Output, Part, Said

#: Seconds after which something that should happen counts as never happening.
PATIENCE = 30.0
#: Seconds in which a call that never waits has returned, on however busy a machine.
AT_ONCE = 5.0
#: Seconds that a worker may outlive its driver (one, and some for a busy machine).
SURVIVAL = 5.0


def check_backend(backend: type[Backend], start_method: str = "auto") -> None:
    """
    Hold *backend* to the contract of `jobq.backend`: order, clean end, kills, crashes, nothing left behind.

    Raises `AssertionError` with a sentence that says which promise is broken. What only a process can promise
    is checked where `Worker.pid` is not None.
    """
    with Bench(backend, start_method) as bench:
        processes = _answers_in_order(bench)  # also warms up what is started once per program
    before = snapshot()
    for check in (_answers_in_order, _shares_a_page, _tells_a_failure, _leaves_siblings_alone):
        with Bench(backend, start_method) as bench:
            check(bench)
    if processes:
        for check in (_never_waits_to_send, _tells_a_crash, _leaves_a_busy_sibling_alone):
            with Bench(backend, start_method) as bench:
                check(bench)
        _ends_with_its_driver(backend, start_method)
    elif backend.own_thread:
        with Bench(backend, start_method) as bench:
            _abandons_what_is_busy(bench)
    _closes_while_working(backend, start_method)
    assert not (left := left_since(before)), f"close() leaves something behind: {left}"


# ── the checks ───────────────────────────────────────────────────────────────


def _answers_in_order(bench: Bench) -> bool:
    """Check the ordinary life of a worker; return whether it is a process."""
    worker = bench.start("echo")
    for number in range(20):
        bench.send(worker, number * 3, ["a", number, None])
    worker.send(Grant(60, 5, 1000))
    assert worker.waitables is worker.waitables, "waitables must be the same object while nothing changes"
    said = [bench.hear(worker) for _ in range(22)]
    assert isinstance(said[0], Hello), f"Hello must come before anything else; {said[0]} came first"
    answers = said[1:]
    numbers = [answer.number for answer in answers if isinstance(answer, Answer) and answer.final]
    assert numbers == [*range(0, 60, 3), 60], f"orders must be answered in order, by number; got {numbers}"
    for number, answer in enumerate(answers[:20]):
        items = bench.items(answer)
        assert items == ["a", number, None], f"items must arrive as they were sent; got {items}"
    assert worker.receive() is None, "receive() must return None while there is nothing to hear"

    objects = [(number, "x" * number) for number in range(5)]
    pieces = [bench.backend.codec.encode(item) for item in objects]
    block = bench.backend.codec.block(pieces).take(1, 4)
    worker.send(Chunk(65, (Part(0, block),), 3))
    items = bench.items(bench.hear(worker))
    assert items == objects[1:4], f"part of a block must arrive as that part; {items} came"

    bench.send(worker, 68, [1])
    worker.close()
    rest = bench.hear_the_end(worker)
    assert isinstance(rest.end, EndOfChannel), f"a worker that ends as told must say so; it {rest.end}"
    assert [type(said) for said in rest.said] == [Answer, Bye], (
        f"after close() a worker must answer what it has, then say Bye; it said {rest.said}"
    )
    assert worker.receive() is None, "the end must be raised once"
    worker.release()
    worker.release()
    return worker.pid is not None


def _shares_a_page(bench: Bench) -> None:
    worker = bench.start("page")
    worker.page[LIMIT] = 42
    bench.send(worker, 0, [None])
    bench.hello(worker)
    items = bench.items(bench.hear(worker))
    assert items == [42], f"the worker must see the driver's words of the page; it saw {items}"
    assert worker.page[LANES] == 2**40, "the driver must see the worker's words of the page"


def _tells_a_failure(bench: Bench) -> None:
    unopened, failing = bench.start("unopened"), bench.start("failing")
    bench.send(failing, 0, [None])
    for worker in (unopened, failing):
        end = bench.hear_the_end(worker).end
        assert isinstance(end, BrokenChannel), f"a worker that can't work must be told as lost; it {end!r}"
        assert "no database" in str(end), f"the end of a worker that can't work must say why; it says: {end}"


def _leaves_siblings_alone(bench: Bench) -> None:
    victim, sibling = bench.start("echo"), bench.start("echo")
    bench.hello(victim)
    victim.kill()
    bench.hear_the_end(victim)
    victim.kill()
    victim.release()
    _assert_works(bench, sibling)


def _leaves_a_busy_sibling_alone(bench: Bench) -> None:
    victim, sibling = bench.start("gate"), bench.start("echo")
    with bench.gate() as gate:
        bench.send(victim, 0, [gate.path, "x" * 1_000_000])
        bench.hello(victim)
        bench.hear(victim)  # it is at the gate
        victim.kill()
        end = bench.hear_the_end(victim).end
    assert isinstance(end, BrokenChannel), f"a worker killed at work must be told as lost; it {end!r}"
    assert "SIGKILL" in str(end), f"the end of a killed worker must name the signal; it says: {end}"
    _assert_works(bench, sibling)


def _abandons_what_is_busy(bench: Bench) -> None:
    victim, sibling = bench.start("gate"), bench.start("echo")
    with bench.gate() as gate:
        bench.send(victim, 0, [gate.path])
        bench.hello(victim)
        bench.hear(victim)
        victim.kill()
        rest = bench.hear_the_end(victim)
        gate.open()
    assert not rest.said, f"an abandoned worker's answers must be dropped; {rest.said} came"
    _assert_works(bench, sibling)


def _never_waits_to_send(bench: Bench) -> None:
    worker = bench.start("gate")
    large = bytes(range(256)) * 40_000
    with bench.gate() as gate:
        bench.send(worker, 0, [gate.path])
        bench.hello(worker)
        bench.hear(worker)
        rescue = threading.Timer(PATIENCE, gate.open)  # else a send that waits would wait for ever
        rescue.start()
        begun = time.monotonic()
        bench.send(worker, 1, [None, large])
        took = time.monotonic() - begun
        rescue.cancel()
        rescue.join()
        assert took < AT_ONCE, f"send() must not wait for a busy worker; it took {took:.1f} s for 10 MB"
        assert worker.receive() is None, "a worker at the gate can't have said anything"
        gate.open()
    bench.hear(worker)
    bench.hear(worker)
    items = bench.items(bench.hear(worker))
    assert items == [None, large], "10 MB must arrive as they were sent"
    worker.close()
    end = bench.hear_the_end(worker).end
    assert isinstance(end, EndOfChannel), f"a worker that ends as told must say so; it {end!r}"


def _tells_a_crash(bench: Bench) -> None:
    sibling = bench.start("echo")
    for how, words in (("exit", "exited with code 0"), ("kill", "was killed by SIGKILL")):
        worker = bench.start("crash")
        bench.send(worker, 0, ["x" * 300_000])
        bench.send(worker, 1, [how])
        rest = bench.hear_the_end(worker)
        assert [type(said) for said in rest.said] == [Hello, Answer], (
            f"a whole answer must count though its worker crashed after it; {rest.said} came"
        )
        assert isinstance(rest.end, BrokenChannel), f"a crash must be told as a loss; it {rest.end!r}"
        assert words in str(rest.end), f"the end must say that the worker {words}; it says: {rest.end}"
        worker.release()
    _assert_works(bench, sibling)


def _closes_while_working(backend: type[Backend], start_method: str) -> None:
    bench = Bench(backend, start_method)
    with bench.gate() as gate:
        try:
            bench.start("echo")
            if backend.own_thread:
                worker = bench.start("gate")
                bench.send(worker, 0, [gate.path])
                bench.hello(worker)
                bench.hear(worker)
        finally:
            bench.close()
            gate.open()  # a thread can't be ended at its gate
    bench.close()


def _ends_with_its_driver(backend: type[Backend], start_method: str) -> None:
    arguments = (backend.__module__, backend.__qualname__, start_method)
    command = f"from jobq.testing import be_a_driver; be_a_driver{arguments}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment
    ) as driver:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        watched = [_Watched(pid) for pid in pids]
        driver.kill()
        driver.wait()
    assert len(pids) == 2, "the driver that was to be killed could not start its workers"
    left = [watch.pid for watch in watched if not watch.ends_within(SURVIVAL)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"no worker may outlive a driver that is killed; {len(left)} of 2 did"


def be_a_driver(module: str, qualname: str, start_method: str) -> NoReturn:
    """Start an idle and a busy worker, print their numbers, and wait to be killed."""
    backend: Any = importlib.import_module(module)
    for name in qualname.split("."):
        backend = getattr(backend, name)
    with Bench(backend, start_method) as bench:
        idle, busy = bench.start("echo"), bench.start("busy")
        bench.send(busy, 0, [None])
        for worker in (idle, busy):
            bench.hello(worker)
        bench.hear(busy)
        print(idle.pid, busy.pid, flush=True)
        while True:
            signal.pause()


def _assert_works(bench: Bench, worker: Worker) -> None:
    bench.send(worker, 0, [7])
    bench.hello(worker)
    items = bench.items(bench.hear(worker))
    assert items == [7], f"losing a worker must not touch another; its sibling gave {items}"
    worker.close()
    end = bench.hear_the_end(worker).end
    assert isinstance(end, EndOfChannel), f"losing a worker must not touch another; its sibling {end!r}"
    worker.release()


# ── the bench: a driver that only waits ──────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Rest:
    """What a worker said up to its end, and the end."""

    said: list[Said]
    end: Exception


class Gate:
    """A named pipe at which a job waits until it is opened."""

    def __init__(self, path: str) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = -1
        self._lock = threading.Lock()

    def open(self) -> None:
        """Let the job go on, and every later one. Idempotent."""
        with self._lock:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                os.write(self._fd, b"go")

    def close(self) -> None:
        """Let go of the pipe."""
        if self._fd >= 0:
            os.close(self._fd)


class Bench:
    """A backend and the workers started on it."""

    def __init__(self, backend: type[Backend], start_method: str = "auto", plan: Plan | None = None) -> None:
        make: Callable[[Plan], Backend] = backend  # how it is made is not in the protocol
        self.backend = make(plan or Plan(RECIPES, start_method))
        self._workers: list[Worker] = []
        self._watched: list[_Watched] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the backend, and check that no process of it runs any more."""
        self.backend.close()
        left = [watch.pid for watch in self._watched if not watch.ends_within(SURVIVAL)]
        self._watched = []
        assert not left, f"close() must end every worker, also at work; {len(left)} still run"

    def start(self, recipe: str) -> Worker:
        """Start a worker for a recipe of the plan."""
        worker = self.backend.start(f"{recipe}-{len(self._workers)}", recipe)
        self._workers.append(worker)
        if worker.pid is not None:
            self._watched.append(_Watched(worker.pid))
        return worker

    def send(self, worker: Worker, number: int, items: list[Any]) -> None:
        """Send *items* as one chunk."""
        worker.send(Chunk(number, (Part(0, self.backend.codec.scalars(items)),), len(items)))

    def items(self, said: Said) -> list[Any]:
        """Return what an answer gives to its first route."""
        assert isinstance(said, Answer), f"an order must be answered; {said} came"
        return self.backend.codec.decode(said.outputs[0].block)

    def hello(self, worker: Worker) -> None:
        """Check that the worker says hello next."""
        said = self.hear(worker)
        assert isinstance(said, Hello), f"Hello must come before anything else; {said} came first"

    def hear(self, worker: Worker) -> Said:
        """Return the next thing the worker says, waiting for it; raise its end."""
        deadline = time.monotonic() + PATIENCE
        while (said := worker.receive()) is None:
            self._wait(worker, deadline)
        return said

    def hear_the_end(self, worker: Worker) -> Rest:
        """Return all that the worker still says, and how it ends."""
        said: list[Said] = []
        try:
            while True:
                said.append(self.hear(worker))
        except (EndOfChannel, BrokenChannel) as end:
            return Rest(said, end)

    @contextmanager
    def gate(self) -> Iterator[Gate]:
        """Make a gate for the length of the ``with``."""
        with tempfile.TemporaryDirectory() as folder:
            gate = Gate(str(Path(folder, "gate")))
            try:
                yield gate
            finally:
                gate.close()

    @staticmethod
    def _wait(worker: Worker, deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            for fd, events in worker.waitables:
                selector.register(fd, events)
            ready = selector.select(max(deadline - time.monotonic(), 0))
        assert ready, f"worker {worker.name} must say something or end; nothing came for {PATIENCE:.0f} s"


# ── what the workers do ──────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe made of one function, which is called with the port, the order and its items."""

    act: Callable[[Port, Order, list[Any]], None]
    lanes: int = 1

    def open(self, port: Port) -> Acting:
        """Return work that does it."""
        if self.act is unopened:
            raise RuntimeError("no database")
        return Acting(port, self.act)


class Acting:
    """Work that calls a function for each order."""

    def __init__(self, port: Port, act: Callable[[Port, Order, list[Any]], None]) -> None:
        self._port = port
        self._act = act

    def run(self, order: Order) -> None:
        """Call the function with the items of *order*, or for a grant with so many numbers."""
        if isinstance(order, Grant):
            items: list[Any] = list(range(order.count))
        else:
            items = [item for part in order.parts for item in self._port.codec.decode(part.block)]
        self._act(self._port, order, items)

    def close(self) -> None:
        """Do nothing: nothing was opened."""


def echo(port: Port, order: Order, items: list[Any]) -> None:
    """Answer with the items."""
    scalars = all(type(item) is not tuple for item in items)
    codec = port.codec
    block = codec.scalars(items) if scalars else codec.block([codec.encode(item) for item in items])
    port.send(Answer(order.number, True, ((0, order.count),), outputs=(Output(0, block),)))


def page(port: Port, order: Order, _: list[Any]) -> None:
    """Answer with what the driver wrote into the page, and write into it."""
    port.page[LANES] = 2**40
    echo(port, order, [port.page[LIMIT]])


def gate(port: Port, order: Order, items: list[Any]) -> None:
    """Say that we are there, wait until the gate opens, then answer with the items."""
    port.send(Answer(order.number, False))
    if items[0] is not None:
        with Path(items[0]).open("rb", buffering=0) as file:
            file.read(1)
    echo(port, order, items)


def busy(port: Port, order: Order, _: list[Any]) -> None:
    """Say that we are there, and never come back."""
    port.send(Answer(order.number, False))
    while True:
        pass


def crash(port: Port, order: Order, items: list[Any]) -> None:
    """End this process as the item says, or answer."""
    if items == ["exit"]:
        os._exit(0)
    if items == ["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)
    echo(port, order, items)


def failing(*_: object) -> None:
    """Raise."""
    raise RuntimeError("no database")


def unopened(*_: object) -> None:
    """Stand for a recipe that can't be opened."""


RECIPES = {act.__name__: Recipe(act) for act in (echo, page, gate, busy, crash, failing, unopened)}


# ── what is left behind ──────────────────────────────────────────────────────


class _Watched:
    """A process that is not our child."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = -1
        self._gone = False
        if hasattr(os, "pidfd_open"):
            try:
                self._fd = os.pidfd_open(pid)
            except ProcessLookupError:
                self._gone = True

    def ends_within(self, seconds: float) -> bool:
        """Return whether the process ends in time; asked once."""
        if self._fd < 0:
            return self._gone or _comes_true(lambda: not _exists(self.pid), seconds)
        try:
            return bool(select.select([self._fd], [], [], seconds)[0])
        finally:
            os.close(self._fd)
            self._fd, self._gone = -1, True


def snapshot() -> dict[str, list[str]]:
    """Return what this process has now: descriptors, threads, children, shared memory."""
    return {
        "descriptors": _descriptors(),
        "threads": [thread.name for thread in threading.enumerate()],
        "processes": _children(),
        "shared memory": sorted(path.name for path in Path("/dev/shm").glob("*") if _is_pythons(path.name)),
    }


def _is_pythons(name: str) -> bool:
    """Whether a name in /dev/shm is one that `multiprocessing` gives: what other programs leave is theirs."""
    return name.startswith(("psm_", "sem.mp-"))


def left_since(before: dict[str, list[str]], seconds: float = 2.0) -> dict[str, list[str]]:
    """Return what is there now and was not *before*, having given it some time to go."""
    left: dict[str, list[str]] = {}

    def nothing() -> bool:
        left.clear()
        for kind, now in snapshot().items():
            more = list(now)
            for name in before[kind]:
                if name in more:
                    more.remove(name)
            if more:
                left[kind] = more
        return not left

    _comes_true(nothing, seconds)
    return left


def _comes_true(claim: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (true := claim()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return true


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _descriptors() -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").is_dir() else ():
        try:
            found.append(f"{link.name} {os.readlink(link)}")  # noqa: PTH115  # not always a path
        except OSError:  # the listing's own
            continue
    return found


def _children() -> list[str]:
    found = []
    for status in (process / "stat" for process in Path("/proc").glob("[0-9]*")):
        try:
            text = status.read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == os.getpid():
            found.append(f"{status.parent.name} {text[text.find('(') :].partition(')')[0]})")
    return found


__all__: Sequence[str] = ["check_backend"]
