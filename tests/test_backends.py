"""Every backend holds the contract, and processes hold it against jobs that misbehave."""

from __future__ import annotations

import errno
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.queues import JoinableQueue, Queue
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jobq import backends
from jobq.backend import Backend, Plan, Preload, Worker
from jobq.backends.child import describe_failure
from jobq.backends.joinable import JoinableInbox
from jobq.backends.memory import OutOfMemory
from jobq.backends.nursery import Nursery
from jobq.backends.processes import (
    DESCRIPTORS_PER_WORKER,
    SPARE_DESCRIPTORS,
    ProcessBackend,
    choose_start_method,
)
from jobq.backends.sentinel import SentinelInbox
from jobq.backends.thread import ThreadBackend, ThreadWorker
from jobq.errors import BackendUnavailable, BrokenChannel, EndOfChannel
from jobq.load import UNGUARDED
from jobq.testing import Bench, Recipe, check_backend, echo
from jobq.wire import Answer, Grant, Hello, Said
from tests.recipes import interrupt, plan

PROCESSES = ("joinable", "sentinel", "pipe")
START_METHODS = ("fork", "forkserver", "spawn")

pytestmark = pytest.mark.usefixtures("no_leaks")


@contextmanager
def bench(name: str = "pipe", start_method: str = "fork", **options: Any) -> Iterator[Bench]:
    with Bench(backends.load(name), plan=plan(start_method, **options)) as made:
        yield made


def ask(made: Bench, worker: Worker, *items: Any) -> list[Any]:
    """Return a worker's answer to its first order."""
    made.send(worker, 0, list(items))
    made.hello(worker)
    return made.items(made.hear(worker))


def descriptors() -> set[str]:
    """Return the numbers of all open descriptors, and of one that looks for them."""
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def end_well(made: Bench, worker: Worker) -> None:
    worker.close()
    rest = made.hear_the_end(worker)
    assert isinstance(rest.end, EndOfChannel), rest
    worker.release()


# ── the contract ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_backend_holds_the_contract(name: str, start_method: str) -> None:
    check_backend(backends.load(name), start_method)


@pytest.mark.parametrize("name", ["thread", "inline"])
def test_a_backend_without_processes_holds_the_contract(name: str) -> None:
    check_backend(backends.load(name))


class Deaf(ThreadBackend):
    """Has workers that never say hello."""

    def start(self, name: str, recipe: str) -> ThreadWorker:
        worker = super().start(name, recipe)
        said = worker._port.said
        worker._port.said = _Without(Hello, said)
        return worker


class Blind(ThreadBackend):
    """Has workers whose page is another than the driver's."""

    def start(self, name: str, recipe: str) -> ThreadWorker:
        worker = super().start(name, recipe)
        worker.page = list(worker.page)
        return worker


class _Without(deque[Said]):
    """Gives something else instead of what is of one type."""

    def __init__(self, unwanted: type, said: Iterable[Said]) -> None:
        super().__init__(said)
        self._unwanted = unwanted

    def popleft(self) -> Said:
        said = super().popleft()
        return Answer(0, True) if isinstance(said, self._unwanted) else said


class Forgetful(ThreadBackend):
    """Opens a descriptor for each worker, and leaves it open."""

    opened: ClassVar[list[int]] = []

    def start(self, name: str, recipe: str) -> ThreadWorker:
        self.opened.append(os.dup(0))
        return super().start(name, recipe)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (Deaf, "Hello must come before"),
        (Blind, "must see the driver's words"),
        (Forgetful, "leaves something behind"),
    ],
)
def test_the_contract_test_notices_a_backend_that_breaks_it(wrong: type[Backend], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_backend(wrong)

    while Forgetful.opened:
        os.close(Forgetful.opened.pop())


# ── finding backends ─────────────────────────────────────────────────────────


def test_an_unknown_backend_is_refused_with_the_known_names() -> None:
    with pytest.raises(BackendUnavailable, match=r"no backend 'ray'; known are inline, joinable, pipe"):
        backends.load("ray")


def test_a_package_adds_a_backend_by_an_entry_point(tmp_path: Path) -> None:
    Path(tmp_path, "their_backend.py").write_text(
        "from jobq.backends.thread import ThreadBackend\nclass Theirs(ThreadBackend):\n    name = 'theirs'\n"
    )
    package = Path(tmp_path, "their_backend-1.0.dist-info")
    package.mkdir()
    Path(package, "METADATA").write_text("Metadata-Version: 2.1\nName: their-backend\nVersion: 1.0\n")
    Path(package, "entry_points.txt").write_text(
        "[jobq.backends]\ntheirs = their_backend:Theirs\nbroken = their_backend:Missing\n"
    )
    program = (
        "from jobq import backends, testing\n"
        "testing.check_backend(backends.load('theirs'))\n"
        "print(backends.names())\n"
        "try: backends.load('broken')\n"
        "except backends.BackendUnavailable as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "'theirs'" in done.stdout
    assert "'broken' (their_backend:Missing) can't be imported" in done.stdout


# ── deaths ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["pipe", "joinable"])
def test_siblings_survive_200_kills_at_random_instants(name: str) -> None:
    dice = random.Random(7)
    with bench(name) as made:
        workers = [made.start("echo") for _ in range(3)]
        sent = dict.fromkeys(workers, 0)
        heard = dict.fromkeys(workers, 0)
        for _ in range(200):
            for worker in workers:
                for _ in range(dice.randrange(4)):
                    made.send(worker, sent[worker], ["x" * dice.choice([1, 5000, 90_000])])
                    sent[worker] += 1
            victim = dice.choice(workers)
            assert victim.pid is not None
            for _ in range(dice.randrange(3)):
                victim.receive()
            os.kill(victim.pid, signal.SIGKILL)
            rest = made.hear_the_end(victim)
            assert str(rest.end).startswith("was killed by SIGKILL")
            victim.release()
            workers[workers.index(victim)] = replacement = made.start("echo")
            sent[replacement] = heard[replacement] = 0
        for worker in workers:
            while heard[worker] < sent[worker]:
                said = made.hear(worker)
                if isinstance(said, Answer):
                    assert said.number == heard[worker]
                    heard[worker] += 1
            end_well(made, worker)


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_death_is_seen_though_a_grandchild_holds_the_channel_open(start_method: str) -> None:
    with bench("pipe", start_method) as made:
        worker = made.start("leave_a_grandchild")

        grandchild = ask(made, worker, None)[0]
        rest = made.hear_the_end(worker)
        os.kill(grandchild, signal.SIGKILL)

    assert str(rest.end) == "was killed by SIGKILL"


def test_a_kill_for_want_of_memory_is_guessed_once_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Path(tmp_path, "memory.events")
    counts.write_text("oom 0\noom_kill 3\noom_group_kill 0\n")
    monkeypatch.setattr("jobq.backends.processes.events_file", lambda: counts)
    ends = []
    with bench() as made:
        workers = [made.start("echo") for _ in range(3)]
        for worker, count in zip(workers, (3, 4, 4), strict=True):
            made.hello(worker)
            assert worker.pid is not None
            counts.write_text(f"oom 0\noom_kill {count}\n")
            os.kill(worker.pid, signal.SIGKILL)
            ends.append(str(made.hear_the_end(worker).end))

    assert ends == [
        "was killed by SIGKILL",
        "was killed by SIGKILL (out of memory?)",
        "was killed by SIGKILL",
    ]


@pytest.mark.parametrize("text", [None, "", "oom_kill", "oom_kill many", "oom 9"])
def test_a_count_of_kills_that_cant_be_read_explains_nothing(text: str | None, tmp_path: Path) -> None:
    counts = Path(tmp_path, "memory.events")
    if text is not None:
        counts.write_text(text)

    assert not OutOfMemory(counts).explains_a_death()


@pytest.mark.parametrize("name", [*PROCESSES, "thread", "inline"])
def test_a_worker_that_cant_go_on_says_why_in_its_first_line_and_where_below(name: str) -> None:
    with bench(name) as made:
        worker = made.start("failing")
        made.send(worker, 0, [None])

        sentence, _, below = str(made.hear_the_end(worker).end).partition("\n")

    assert sentence == "could not go on: RuntimeError: no database"
    assert below.startswith("Traceback (most recent call last):\n")
    assert below.endswith("RuntimeError: no database")


def test_a_failure_of_many_lines_is_named_by_the_first_that_says_what_it_is() -> None:
    failures: list[BaseException] = [ValueError("one\ntwo"), ExceptionGroup("several", [ValueError("x")])]
    try:
        compile("def f(:", "some.py", "exec")
    except SyntaxError as error:
        error.add_note("a note")
        failures.append(error)

    assert [describe_failure(error).partition("\n")[0] for error in failures] == [
        "could not go on: ValueError: one",
        "could not go on: ExceptionGroup: several (1 sub-exception)",
        "could not go on: SyntaxError: invalid syntax",
    ]


def test_half_a_frame_never_counts() -> None:
    with bench() as made:
        worker = made.start("die_in_a_frame")
        made.send(worker, 0, [None])

        rest = made.hear_the_end(worker)

    assert [type(said) for said in rest.said] == [Hello]
    assert str(rest.end) == "was killed by SIGKILL"


def test_garbage_on_the_channel_is_told_and_its_writer_stopped() -> None:
    with bench() as made:
        worker = made.start("write_garbage")
        made.send(worker, 0, [None])

        rest = made.hear_the_end(worker)

    assert isinstance(rest.end, BrokenChannel)
    assert "garbage" in str(rest.end)


def kill_keeper(made: Bench) -> None:
    """Kill the process that forks workers, and see it die, when there is one that would take its place."""
    assert _nursery(made).spare_pid is not None
    kill_and_see(_nursery(made).pid)


def kill_spare(made: Bench) -> None:
    """Kill the process that would take its place, and see it die."""
    pid = _nursery(made).spare_pid
    assert pid is not None
    kill_and_see(pid)


def kill_and_see(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)


@pytest.mark.parametrize("name", PROCESSES)
def test_workers_go_on_when_the_process_that_forked_them_is_killed(name: str) -> None:
    with bench(name) as made:
        idle, busy = made.start("echo"), made.start("gate")
        with made.gate() as gate:
            made.send(busy, 0, [gate.path, "x"])
            made.hello(busy)
            made.hear(busy)
            kill_keeper(made)
            gate.open()

            assert made.items(made.hear(busy)) == [gate.path, "x"]
        assert ask(made, idle, 1) == [1]
        end_well(made, idle)
        end_well(made, busy)


@pytest.mark.parametrize("act", ["busy", "crash", "leave_a_grandchild"])
def test_the_death_of_a_worker_whose_forker_was_killed_is_seen_and_it_is_replaced(act: str) -> None:
    with bench() as made, busy_threads(1):
        worker = made.start(act)
        made.hello(worker)
        kill_keeper(made)
        made.send(worker, 0, ["kill"])
        grandchild = None
        if act != "crash":
            said = made.hear(worker)
            if act == "busy":
                worker.kill()
            else:
                grandchild = made.items(said)[0]

        rest = made.hear_the_end(worker)
        worker.release()
        if grandchild is not None:
            os.kill(grandchild, signal.SIGKILL)

        assert isinstance(rest.end, BrokenChannel)
        assert str(rest.end).startswith("ended, how is not known")
        assert ask(made, made.start("echo"), 1) == [1]


def test_a_run_outlives_any_number_of_keepers_while_threads_run() -> None:
    with bench("joinable") as made, busy_threads(1):
        workers = []
        for _ in range(10):
            workers.append(made.start("echo"))
            kill_keeper(made)

        for worker in workers:
            assert ask(made, worker, 1) == [1]
            end_well(made, worker)


def test_a_killed_spare_is_replaced_by_the_next_start() -> None:
    with bench() as made, busy_threads(1):
        for _ in range(3):
            kill_spare(made)
            end_well(made, made.start("echo"))
        assert _nursery(made).spare_pid is not None
        kill_keeper(made)

        assert ask(made, made.start("echo"), 1) == [1]


@pytest.mark.parametrize("name", PROCESSES)
def test_two_lost_forkers_are_replaced_by_the_driver_where_no_threads_run(name: str) -> None:
    with bench(name) as made:
        worker = made.start("echo")
        kill_spare(made)
        kill_keeper(made)

        another = made.start("echo")

        for one in (another, worker):
            assert ask(made, one, 1) == [1]
            end_well(made, one)  # the new keeper doesn't hold its inbox


@pytest.mark.parametrize("name", PROCESSES)
def test_two_lost_forkers_are_replaced_by_a_fork_server_where_threads_run(name: str) -> None:
    with bench(name) as made, busy_threads(1):
        worker = made.start("echo")
        kill_spare(made)
        kill_keeper(made)

        others = [made.start("echo") for _ in range(2)]

        for one in (worker, *others):
            assert ask(made, one, 1) == [1]
            end_well(made, one)


def test_two_lost_forkers_are_told_where_no_fork_server_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with bench() as made, busy_threads(1):
        worker = made.start("echo")
        backend: Any = made.backend
        monkeypatch.setitem(backend._plan.recipes, "echo", Recipe(lambda *_: None))  # which can't be sent
        kill_spare(made)
        kill_keeper(made)

        for _ in range(2):
            with pytest.raises(BackendUnavailable, match="start_method='forkserver'"):
                made.start("echo")
        assert ask(made, worker, 1) == [1]


@pytest.mark.parametrize("spare", ["spare", "no spare"])
def test_a_forker_that_is_killed_while_it_forks_leaves_no_second_reader(
    spare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench() as made:
        nursery = _nursery(made)
        if spare == "no spare":
            kill_spare(made)
        fork = type(nursery._keeper).fork

        def fork_and_lose(*given: Any) -> tuple[int, int]:
            """Have the worker forked, and lose the answer."""
            pid, pidfd = fork(*given)
            monkeypatch.undo()
            forked.append(pidfd)
            kill_keeper(made)
            raise EOFError(pid)

        forked: list[int] = []
        monkeypatch.setattr(type(nursery._keeper), "fork", fork_and_lose)
        worker = made.start("echo")

        assert ask(made, worker, 1) == [1]
        assert select.select(forked, [], [], 30)[0], "the worker that nobody knows of must end"
        os.close(forked[0])


@pytest.mark.parametrize("lost", ["keeper", "spare", "both"])
def test_no_worker_outlives_its_driver_though_its_forker_was_killed_first(lost: str) -> None:
    program = (
        "import os, signal, sys\n"
        "from tests.test_backends import bench, kill_keeper, kill_spare, _nursery\n"
        "with bench() as made:\n"
        "    idle, busy = made.start('echo'), made.start('busy')\n"
        "    made.send(busy, 0, [None])\n"
        "    for worker in (idle, busy): made.hello(worker)\n"
        "    made.hear(busy)\n"
        "    keepers = [_nursery(made).pid, _nursery(made).spare_pid]\n"
        f"    if {lost!r} != 'keeper': kill_spare(made)\n"
        f"    if {lost!r} != 'spare': kill_keeper(made)\n"
        f"    keepers = dict(keeper=keepers[1:], spare=keepers[:1], both=[])[{lost!r}]\n"
        "    print(idle.pid, busy.pid, *keepers, flush=True)\n"
        "    signal.pause()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, text=True
    ) as driver:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        watched = [os.pidfd_open(pid) for pid in pids]
        driver.kill()
        driver.wait()

    assert len(pids) >= 2
    for pidfd in watched:
        assert select.select([pidfd], [], [], 5)[0]
        os.close(pidfd)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_first_workers_are_forked_before_they_are_asked_for(name: str) -> None:
    with bench(name, first=["echo", "gate", "echo"]) as made:
        kill_keeper(made)  # who has nothing more to fork

        workers = [made.start("echo"), made.start("gate"), made.start("echo")]
        other = made.start("echo")

        for worker in (workers[2], other, workers[0]):
            assert ask(made, worker, 1) == [1]
            end_well(made, worker)  # nobody else holds its inbox
        end_well(made, workers[1])


def test_others_can_be_asked_for_before_the_first() -> None:
    with bench(first=["echo", "echo"]) as made:
        other = made.start("gate")
        worker = made.backend.start("echo-1", "echo")

        assert ask(made, worker, 1) == [1]
        end_well(made, other)
        end_well(made, worker)


def test_first_workers_that_nobody_asks_for_end_with_the_backend() -> None:
    with bench(first=["echo", "busy"]) as made:
        worker = made.start("echo")  # the other one is there, too
        assert _nursery(made).spare_pid is not None
        keeper = _nursery(made).pid
        pids = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        watched = [os.pidfd_open(int(pid)) for pid in pids]

    assert str(worker.pid) in pids
    assert len(pids) == 3  # and the spare
    for pidfd in watched:
        assert select.select([pidfd], [], [], 5)[0]
        os.close(pidfd)


@pytest.mark.parametrize("threads", [0, 1])
def test_a_forker_that_is_killed_while_it_forks_the_first_leaves_no_second_reader(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(first=["echo", "echo"]) as made, busy_threads(threads):
        contact = type(_nursery(made)._keeper)
        forked = contact.forked
        lost: list[int] = []

        def lose(keeper: Any, name: str) -> tuple[int, int]:
            """Lose what the keeper says of the first worker, and the keeper."""
            lost.append(forked(keeper, name)[1])
            monkeypatch.undo()
            kill_keeper(made)
            raise EOFError(name)

        monkeypatch.setattr(contact, "forked", lose)
        workers = [made.start("echo") for _ in range(3)]

        for worker in workers:
            assert ask(made, worker, 1) == [1]
            end_well(made, worker)
        assert select.select(lost, [], [], 30)[0], "the worker that nobody knows of must end"
        os.close(lost[0])


def test_a_first_worker_that_can_not_be_forked_is_told_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, fork = os.getpid(), os.fork

    def refuse() -> int:
        if os.getpid() != here:
            raise BlockingIOError(errno.EAGAIN, "refused")
        return fork()

    monkeypatch.setattr(os, "fork", refuse)
    with bench(first=["echo", "echo"]) as made:
        for _ in range(2):
            with pytest.raises(OSError, match="can't start worker echo-0"):
                made.start("echo")


def _nursery(made: Bench) -> Nursery:
    assert isinstance(made.backend, ProcessBackend)
    assert made.backend._nursery is not None
    return made.backend._nursery


# ── jobs that change their process ───────────────────────────────────────────


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize("act", ["close_everything_and_open", "replace_the_inbox"])
def test_a_job_that_closes_the_channel_never_has_the_users_file_written(
    start_method: str, act: str, tmp_path: Path
) -> None:
    file = Path(tmp_path, "precious")
    file.touch()
    with bench("pipe", start_method) as made:
        worker = made.start(act)
        made.send(worker, 0, [str(file)])

        rest = made.hear_the_end(worker)

    assert isinstance(rest.end, BrokenChannel)
    assert [type(said) for said in rest.said] == [Hello]
    assert file.read_bytes() == b""


def test_a_job_that_closed_the_channel_is_told_so() -> None:
    with bench() as made:
        worker = made.start("replace_the_inbox")
        made.send(worker, 0, ["/dev/null"])

        assert "closed descriptors that are not its own" in str(made.hear_the_end(worker).end)


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_job_that_comes_back_twice_is_answered_once(start_method: str) -> None:
    with bench("joinable", start_method) as made:
        worker = made.start("fork_and_come_back_twice")
        made.send(worker, 0, [1])
        made.send(worker, 1, [2])
        worker.close()

        rest = made.hear_the_end(worker)

    numbers = [said.number for said in rest.said if isinstance(said, Answer)]
    assert numbers == [0, 1]
    assert isinstance(rest.end, EndOfChannel)


@pytest.mark.parametrize("start_method", START_METHODS)
def test_what_a_job_left_in_buffers_and_exit_hooks_is_written(start_method: str, tmp_path: Path) -> None:
    file = Path(tmp_path, "lines")
    with bench("pipe", start_method) as made:
        worker = made.start("write_without_closing")
        ask(made, worker, str(file))
        end_well(made, worker)

    assert sorted(file.read_text().splitlines()) == ["written at exit", "written by the job"]


def test_a_file_that_the_driver_holds_open_is_written_once_by_each(tmp_path: Path) -> None:
    path = Path(tmp_path, "lines")
    with path.open("a") as file:
        file.write("the driver's\n")

        def write(port: Any, order: Any, items: list[Any]) -> None:
            file.write(f"{items[0]}\n")
            echo(port, order, items)

        with Bench(backends.load("pipe"), plan=Plan({"write": Recipe(write)}, "fork")) as made:
            for number in (1, 2):
                worker = made.start("write")
                ask(made, worker, number)
                end_well(made, worker)

    assert path.read_text().splitlines() == ["the driver's", "1", "2"]


SEARCHES = """
import sys
from jobq import backends
from jobq.backend import Plan
from jobq.backends import child
from jobq.testing import Recipe, echo

found = []
search = child.open_files
child.open_files = lambda: found.append(search()) or found[-1]
plan = Plan({"echo": Recipe(echo)}, "fork", first=[("echo-1", "echo")])
backends.load("joinable")(plan).close()
print(len(found))
with open(sys.argv[1], "w") as file:
    backends.load("joinable")(plan).close()
    print(file in found[0])
"""


def test_all_objects_are_searched_for_open_files_only_where_one_is_open(tmp_path: Path) -> None:
    program = [sys.executable, "-c", SEARCHES, str(tmp_path / "file")]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.split() == ["0", "True"]


@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize("daemon", [True, False])
def test_a_worker_is_a_daemon_of_its_name_unless_told_not_to_be(start_method: str, daemon: bool) -> None:
    with bench("pipe", start_method, daemon={"who_am_i": daemon}) as made:
        worker = made.start("who_am_i")

        assert ask(made, worker, None) == [worker.name, daemon, not daemon]
        end_well(made, worker)


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_worker_ignores_what_the_terminal_sends_and_dies_of_sigterm(start_method: str) -> None:
    with bench("pipe", start_method) as made:
        worker = made.start("dispositions")
        assert ask(made, worker, None) == [True]
        assert worker.pid is not None

        os.kill(worker.pid, signal.SIGTERM)

        assert str(made.hear_the_end(worker).end) == "was killed by SIGTERM"


@pytest.mark.parametrize("start_method", START_METHODS)
def test_workers_draw_different_random_numbers(start_method: str) -> None:
    with bench("pipe", start_method) as made:
        drawn = {ask(made, made.start("draw"), None)[0] for _ in range(3)}

    assert len(drawn) == 3


# ── start methods and embedding programs ─────────────────────────────────────


@contextmanager
def busy_threads(count: int) -> Iterator[None]:
    """Run threads that hold locks most of the time."""
    over = threading.Event()
    lock = threading.Lock()

    def run() -> None:
        while not over.is_set():
            with lock:
                sum(range(1000))

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_auto_forks_only_while_no_other_thread_runs() -> None:
    assert choose_start_method("auto") == "fork"
    with busy_threads(1):
        assert choose_start_method("auto") == "forkserver"
    assert choose_start_method("auto") == "fork"


def test_an_unknown_start_method_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="'thread'; known are auto, fork"):
        choose_start_method("thread")


def test_workers_are_replaced_while_the_embedding_program_has_busy_threads() -> None:
    with bench() as made, busy_threads(4):
        for _ in range(30):
            worker = made.start("echo")
            assert ask(made, worker, "x") == ["x"]
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            assert str(made.hear_the_end(worker).end) == "was killed by SIGKILL"
            worker.release()


def test_fork_under_threads_works_if_asked_for() -> None:
    with busy_threads(2), bench("joinable", "fork") as made:
        worker = made.start("echo")
        assert ask(made, worker, "x") == ["x"]
        end_well(made, worker)


def test_a_backend_made_in_a_thread_that_has_ended_works_on() -> None:
    made: list[Bench] = []
    thread = threading.Thread(target=lambda: made.append(Bench(backends.load("pipe"), "fork")))
    thread.start()
    thread.join()

    with made[0] as bench_:
        worker = bench_.start("echo")
        assert ask(bench_, worker, "x") == ["x"]
        end_well(bench_, worker)


def test_a_program_without_main_guard_is_told_that_its_workers_never_came_up(tmp_path: Path) -> None:
    program = Path(tmp_path, "program.py")
    program.write_text(
        "from jobq.backends import load\n"
        "from jobq.testing import Bench\n"
        "with Bench(load('pipe'), 'spawn') as bench:\n"
        "    print(bench.hear_the_end(bench.start('echo')).end)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stdout == "exited with code 1 before it was ready\n", done.stderr


def test_closures_are_fine_with_fork() -> None:
    secret = object()

    def tell(port: Any, order: Any, items: list[Any]) -> None:  # noqa: ARG001
        echo(port, order, [type(secret).__name__])

    with Bench(backends.load("pipe"), plan=Plan({"tell": Recipe(tell)}, "fork")) as made:
        assert ask(made, made.start("tell"), None) == ["object"]


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_closures_are_refused_where_they_cant_travel(start_method: str) -> None:
    recipes = {"tell": Recipe(lambda *_: None)}

    with pytest.raises(BackendUnavailable, match=rf"tell can't be sent .* by {start_method}: .*'fork'"):
        backends.load("pipe")(Plan(recipes, start_method))  # type: ignore[call-arg]


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
@pytest.mark.parametrize("hidden", ["json", "pickle", "signal", "socket", "threading", "typing"])
def test_the_current_folder_hides_nothing_of_the_standard_library_from_children(
    hidden: str, start_method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(tmp_path, f"{hidden}.py").write_text("raise RuntimeError('not the one you think')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with bench("pipe", start_method) as made:
        assert ask(made, made.start("echo"), 1) == [1]


def test_a_driver_that_is_killed_leaves_no_file_of_its_fork_server(tmp_path: Path) -> None:
    program = (
        "import signal\n"
        "from jobq.backends import load\n"
        "from jobq.testing import Bench\n"
        "with Bench(load('pipe'), 'forkserver') as bench:\n"
        "    bench.hello(bench.start('echo'))\n"
        "    print('up', flush=True)\n"
        "    signal.pause()\n"
    )
    # So long a name that a socket could not be bound in it.
    folder = Path(tmp_path, "t" * 100)
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, text=True
    ) as driver:
        assert driver.stdout is not None
        up = driver.stdout.readline()
        left = list(folder.iterdir())
        driver.kill()

    assert up == "up\n"
    assert left == []


def test_a_fork_server_that_was_killed_is_replaced_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with bench("pipe", "forkserver") as made:
        assert ask(made, made.start("echo"), 1) == [1]
        pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

        assert ask(made, made.start("echo"), 1) == [1]
        assert list(tmp_path.iterdir()) == []


def test_a_fork_server_that_can_not_import_the_program_says_main_guard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(tmp_path, "unguarded.py").write_text(f"import os\nos._exit({UNGUARDED})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with bench("pipe", "forkserver") as made:
        forkserver.set_forkserver_preload(["unguarded"])

        with pytest.raises(BackendUnavailable, match="main guard"):
            made.start("echo")


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_preloaded_file_is_found_under_its_name(start_method: str, tmp_path: Path) -> None:
    path = Path(tmp_path, "some-pipeline.py")
    path.write_text("COLOUR = 'green'\n")
    preload = Preload(str(path), "some_pipeline", str(tmp_path))
    with bench("pipe", start_method, preload=preload) as made:
        assert ask(made, made.start("where_from"), "some_pipeline") == ["green"]


def test_a_preloaded_file_that_fails_is_told_with_its_traceback(tmp_path: Path) -> None:
    path = Path(tmp_path, "bad.py")
    path.write_text("1 / 0\n")
    with bench("pipe", "spawn", preload=Preload(str(path), "bad_file", str(tmp_path))) as made:
        end = made.hear_the_end(made.start("echo")).end

    assert isinstance(end, BrokenChannel)
    assert "ZeroDivisionError" in str(end)


def test_a_process_that_the_embedding_program_forks_doesnt_hold_up_the_end() -> None:
    with bench("pipe") as made:
        worker = made.start("echo")
        ask(made, worker, 1)
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    signal.pause()
            finally:
                os._exit(1)

        end_well(made, worker)

        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("start_method", "rooms"), [("fork", range(12)), ("forkserver", range(3, 13)), ("spawn", range(3, 13))]
)
def test_a_lack_of_descriptors_is_an_oserror_and_leaves_nothing(
    start_method: str, rooms: Iterable[int]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with bench("joinable", start_method) as made:
        end_well(made, made.start("echo"))  # what is started once is started
        for room in rooms:
            before = descriptors()
            free = [number for number in range(200) if str(number) not in before]
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[room], limits[1]))
            try:
                with pytest.raises(OSError, match=r"Too many open files"):
                    for _ in range(3):
                        made.start("echo").kill()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)

        assert ask(made, made.start("echo"), 1) == [1]


@pytest.mark.parametrize("first", [0, 2, 8])
def test_as_many_workers_as_there_are_descriptors_for_can_be_started(first: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    names = [f"worker-{number}" for number in range(8)]
    wanted = Plan(
        {"echo": Recipe(echo)}, "fork", workers=len(names), first=[(name, "echo") for name in names[:first]]
    )
    needed = len(names) * DESCRIPTORS_PER_WORKER + SPARE_DESCRIPTORS
    # The listing's own descriptor is in it.
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(descriptors()) + needed, limits[1]))
    try:
        with Bench(backends.load("joinable"), plan=wanted) as made:
            answers = [ask(made, made.backend.start(name, "echo"), 1) for name in names]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert answers == [[1]] * len(names)


# ── one by one ───────────────────────────────────────────────────────────────


def test_a_joinable_inbox_is_a_joinable_queue_that_counts() -> None:
    inbox = JoinableInbox()
    for number in range(2):
        inbox.put(Grant(number, 1, 1))
    inbox.end()
    inbox.answered()
    assert not inbox.stream.writer.closed, "one order is not answered yet"

    inbox.answered()

    assert isinstance(inbox, JoinableQueue)
    assert inbox.stream.writer.closed
    with pytest.raises(ValueError, match="called too many times"):
        inbox.task_done()
    inbox.abandon()


def test_an_abandoned_joinable_inbox_can_be_joined() -> None:
    inbox = JoinableInbox()
    for number in range(3):
        inbox.put(Grant(number, 1, 1))

    inbox.abandon()
    inbox.join()

    assert inbox.stream.reader.closed


def test_a_sentinel_inbox_is_a_queue() -> None:
    inbox = SentinelInbox()
    inbox.end()

    assert isinstance(inbox, Queue)
    assert select.select([inbox.stream.reader], [], [], 0)[0]
    inbox.abandon()


def test_ctrl_c_during_inline_work_reaches_the_caller() -> None:
    with Bench(backends.load("inline"), plan=Plan({"interrupt": Recipe(interrupt)})) as made:
        worker = made.start("interrupt")
        made.send(worker, 0, [None])
        made.hello(worker)

        with pytest.raises(KeyboardInterrupt):
            made.hear(worker)


def test_an_order_of_many_parts_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobq.backends.channel.MOST_BUFFERS", 3)
    with bench() as made:
        worker = made.start("echo")
        items = ["x" * 1000 for _ in range(1000)]

        assert ask(made, worker, *items) == items
