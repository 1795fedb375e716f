"""Runs that are stopped: from a terminal, by a signal, by whoever reads, by an error; nothing is left."""

# ruff: noqa: ARG001  # jobs take items, resources and jobs that they need not look at

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobq import Job, JobqError, Pipeline
from jobq.cli import main
from jobq.cli.run import run as run_command
from jobq.running import prepare
from jobq.testing import left_since, snapshot
from tests.test_run import BACKENDS, PROCESSES, Gate, Notes, ints

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

#: A safety net: whatever is waited for comes within so many seconds, or the test fails.
PATIENCE = 40.0
#: The variable by which a run's processes are found, whatever became of their parents.
MARK = "STOPPING_TEST"

CTRL_C = b"\x03"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=PROCESSES)
def processes(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def handlers_back() -> Iterator[None]:
    """After the test the process hears signals as before."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


#: What jobs do is a parameter; they wait at a gate in the current folder, and say so on the terminal.
PROGRAM = """
import itertools, os, signal, sys, time
from collections.abc import Iterator
from jobq import Pipeline

pipeline = Pipeline("p", shutdown_timeout=300)

def say(text: str) -> None:
    os.write(1, f"<{text}>\\n".encode())

def pass_gate() -> None:
    os.close(os.open("gate", os.O_RDONLY))

@pipeline.producer
def numbers(count: int = -1, then: str = "") -> Iterator[int]:
    for number in itertools.count() if count < 0 else range(count):
        yield number
    say("given")
    while then == "block":
        time.sleep(1000)

@pipeline.resource
def db(teardown: str = "") -> Iterator[int]:
    yield 1
    if teardown == "hang":
        say("tearing down")
        while True:
            time.sleep(1000)

@pipeline.consumer(workers=2, queue_size=20)
def work(number: int, db: int, how: str = "quick") -> int:
    if how != "quick":
        say(how)
    if how == "gate":
        pass_gate()
    if how == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        while True:
            signal.sigwait([signal.SIGTERM])
    while how == "stubborn":
        try:
            time.sleep(1000)
        except BaseException:
            pass
    with open("done", "a") as file:
        file.write(f"{number}\\n")
    return number
"""


class Run:
    """`jobq run` in a terminal of its own, of which it has the foreground: what we write there are keys."""

    def __init__(self, folder: Path, *arguments: str, output: int | None = None) -> None:
        self.folder = folder
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        self.keyboard, far = pty.openpty()
        self._raw = b""
        name, value = self.mark.split("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobq.cli", "run", "p.py", *arguments],
            stdin=far,
            stdout=far if output is None else output,
            stderr=far,
            cwd=folder / "here",
            env=os.environ | {"TERM": "xterm", "TMPDIR": str(folder / "tmp"), name: value},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  # no thread runs here
        )
        os.close(far)

    @property
    def text(self) -> str:
        """All that was shown, without what moves the cursor; a terminal's long lines as they were written."""
        return ESCAPES.sub("", self._raw.decode(errors="replace")).replace("\r", "")

    def press(self, key: bytes) -> None:
        os.write(self.keyboard, key)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def shows(self, pattern: str, count: int = 1) -> None:
        """Wait until *pattern* was shown so often."""
        deadline = time.monotonic() + PATIENCE
        while len(re.findall(pattern, self.text)) < count:
            assert time.monotonic() < deadline, f"never shown: {pattern}\n{self.text[-2000:]}"
            assert self.look(), f"not shown before the end: {pattern}\n{self.text[-2000:]}"

    def ends(self) -> int:
        """Wait for the end, prove that nothing is left nor garbled, and return the exit code."""
        code = self.ends_somehow()
        assert "KeyboardInterrupt" not in self.text
        assert "Exception ignored" not in self.text
        return code

    def ends_somehow(self) -> int:
        """Wait for the end, prove that nothing is left, and return the exit code."""
        deadline = time.monotonic() + PATIENCE
        while self.look():
            assert time.monotonic() < deadline, f"no end\n{self.text[-2000:]}"
        code = self.process.wait(PATIENCE)
        assert until(lambda: not self.alive()), f"left behind: {self.alive()}"
        assert list((self.folder / "tmp").iterdir()) == []
        return code

    def alive(self) -> list[int]:
        """Return the processes that have our mark in their environment."""
        found = []
        for path in (process / "environ" for process in Path("/proc").glob("[0-9]*")):
            with contextlib.suppress(OSError):
                if self.mark.encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def close(self) -> None:
        """End everything, however the test went."""
        for pid in self.alive():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.keyboard)

    def done(self) -> set[int]:
        """Return the numbers whose jobs were done: evidence from outside."""
        file = self.folder / "here" / "done"
        return {int(line) for line in file.read_text().splitlines()} if file.exists() else set()

    def letters(self) -> list[dict[str, Any]]:
        """Return the dead letters; there is no file that isn't expected."""
        names = {path.name for path in (self.folder / "here").iterdir()} - {"p.py", "gate", "done"}
        files = [name for name in names if name.endswith(".dead.jsonl")]
        assert names - {"__pycache__"} == set(files)
        texts = [(self.folder / "here" / name).read_text() for name in files]
        return [json.loads(line) for text in texts for line in text.splitlines()]

    def look(self) -> bool:
        """Take in what is shown, waiting a little; return whether more may come."""
        if select.select([self.keyboard], [], [], 0.05)[0]:
            try:
                read = os.read(self.keyboard, 65536)
            except OSError:  # EIO: nobody has the terminal open any more
                return False
            self._raw += read
            return bool(read)
        return True


def until(claim: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not (true := claim()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return true


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []
    for folder in ("here", "tmp"):
        (tmp_path / folder).mkdir()
    (tmp_path / "here" / "p.py").write_text(PROGRAM)

    def start(backend: str, *arguments: str, **others: Any) -> Run:
        runs.append(Run(tmp_path, "-b", backend, *arguments, **others))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


@pytest.fixture
def gate(tmp_path: Path, start: Start) -> Iterator[Gate]:
    gate = Gate(tmp_path / "here" / "gate")
    yield gate
    gate.close()


def balanced(run: Run, given: int) -> None:
    """Every number that was given is done, or is a cancelled letter, or (stopped between) both."""
    letters = run.letters()
    assert {letter["status"] for letter in letters} <= {"cancelled"}
    assert run.done() | {letter["item"] for letter in letters} == set(range(given))


# --- the ladder, at a keyboard -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["keyboard", "SIGTERM"])
def test_the_first_stop_finishes_what_was_accepted_and_shows_what_remains(
    backend: str, how: str, start: Start, gate: Gate
) -> None:
    run = start(backend, "-p", "how=gate")
    run.shows("<gate>")

    run.press(CTRL_C) if how == "keyboard" else run.send(signal.SIGTERM)
    word = "interrupted" if how == "keyboard" else "terminated"
    run.shows(rf"{word}; finishing \d+ accepted items?, press Ctrl-C again to stop now")
    if backend != "inline":  # where a job holds up whoever draws
        run.shows(r"work +0 .*in flight", count=2)
    gate.open()

    assert run.ends() == (130 if how == "keyboard" else 143)
    accepted = re.search(r"numbers +(\d+)  ", run.text.rpartition("\nstage ")[2])
    assert accepted is not None
    assert run.done() == set(range(int(accepted[1])))
    assert run.letters() == []


def test_signals_that_come_all_at_once_do_not_end_a_run_as_if_it_were_done(
    backend: str, start: Start
) -> None:
    run = start(backend, "-p", "count=5", "-p", "then=block")
    run.shows("<given>")

    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCONT):
        run.send(number)  # those between the two are heard in one moment

    assert run.ends_somehow() in (130, 143, 129)


@pytest.mark.parametrize("how", ["keyboard", "SIGTERM"])
def test_a_stop_after_the_producers_end_is_no_failure(
    backend: str, how: str, start: Start, gate: Gate
) -> None:
    run = start(backend, "-p", "how=gate", "-p", "count=5", "-p", "then=")
    run.shows("<gate>")
    if backend != "inline":
        run.shows("<given>")

    run.press(CTRL_C) if how == "keyboard" else run.send(signal.SIGTERM)
    run.shows("finishing")
    gate.open()

    code = run.ends()
    # inline, the producer may still have been asked for more
    assert code == 0 or (backend == "inline" and code in (130, 143))
    assert run.letters() == []
    assert backend == "inline" or run.done() == set(range(5))


@pytest.mark.parametrize("how", ["deaf", "stubborn"])
def test_the_second_stop_gets_through_whatever_the_workers_do(processes: str, how: str, start: Start) -> None:
    run = start(processes, "-p", f"how={how}", "-p", "count=300")
    run.shows(f"<{how}>", count=2)

    run.press(CTRL_C)
    run.shows("finishing")
    run.press(CTRL_C)
    run.shows(r"stopping the jobs in progress, \d+ accepted items unfinished")

    assert run.ends() == 130
    received = re.search(r"\n(\d+) cancelled in", run.text)
    assert received is not None
    balanced(run, given=int(received[1]))
    assert run.done() == set()


@pytest.mark.parametrize("how", ["gate", "stubborn"])
def test_threads_are_abandoned_at_the_second_stop(how: str, start: Start, gate: Gate) -> None:
    run = start("thread", "-p", f"how={how}", "-p", "count=20")
    run.shows(f"<{how}>", count=2)
    run.shows("<given>")

    run.press(CTRL_C)
    run.shows(r"finishing \d+ accepted items")
    run.press(CTRL_C)

    assert run.ends() == 130
    balanced(run, given=20)


def test_on_inline_the_second_stop_ends_the_job_in_hand(start: Start, gate: Gate) -> None:
    run = start("inline", "-p", "how=gate", "-p", "count=5")
    run.shows("<gate>")

    run.press(CTRL_C)
    run.shows("finishing")
    run.press(CTRL_C)
    run.shows("stopping the jobs in progress")

    assert run.ends() == 130
    assert [letter["status"] for letter in run.letters()] == ["cancelled"] * len(run.letters())
    assert run.letters()


def test_on_inline_a_blocked_producer_hears_the_first_stop_and_ends_at_the_second(start: Start) -> None:
    run = start("inline", "-p", "count=3", "-p", "then=block")
    run.shows("<given>")

    run.press(CTRL_C)
    run.shows("interrupted;.*press Ctrl-C again to stop now\n")
    run.press(CTRL_C)

    assert run.ends() == 130
    assert run.done() == {0, 1, 2}


def test_a_producer_that_never_yields_again_is_stopped_and_said_to_be(processes: str, start: Start) -> None:
    run = start(processes, "-p", "count=3", "-p", "then=block")
    run.shows("<given>")

    run.press(CTRL_C)

    assert run.ends() == 130
    assert "stage numbers" in run.text
    assert "was stopped: it did not come to its next yield" in run.text
    assert run.done() == {0, 1, 2}
    assert run.letters() == []


def test_a_thread_that_never_yields_again_is_left(start: Start) -> None:
    run = start("thread", "-p", "count=3", "-p", "then=block")
    run.shows("<given>")

    run.press(CTRL_C)

    assert run.ends() == 130
    assert run.done() == {0, 1, 2}


@pytest.mark.parametrize("backend", [*PROCESSES, "thread"])
def test_a_teardown_that_hangs_can_be_stopped(backend: str, start: Start) -> None:
    run = start(backend, "-p", "count=3", "-p", "teardown=hang")
    run.shows("<tearing down>")

    run.press(CTRL_C)
    run.shows(r"no accepted item is left, waiting for \d workers? to end, press Ctrl-C again to stop now")
    run.press(CTRL_C)

    assert run.ends() == 0  # all the work was done
    assert run.done() == {0, 1, 2}
    assert run.letters() == []


@pytest.mark.parametrize("backend", [*PROCESSES, "thread"])
def test_a_teardown_that_hangs_is_stopped_in_time_and_said_to_be(backend: str, start: Start) -> None:
    run = start(backend, "-p", "count=3", "-p", "teardown=hang", "--shutdown-timeout", "0.5")

    assert run.ends() == 0
    assert "was stopped: it did not end within 0.5 s" in run.text
    assert run.done() == {0, 1, 2}


def test_the_time_for_finishing_has_an_end(processes: str, start: Start) -> None:
    run = start(processes, "-p", "how=deaf", "-p", "count=20", "--shutdown-timeout", "0.5")
    run.shows("<deaf>", count=2)
    run.shows("<given>")

    run.press(CTRL_C)

    assert run.ends() == 130
    assert "the time for finishing is over; stopping the jobs in progress, 20 accepted items" in run.text
    balanced(run, given=20)


def test_a_huge_backlog_is_written_down(processes: str, start: Start, tmp_path: Path) -> None:
    text = PROGRAM.replace("queue_size=20", "queue_size=20_000")
    (tmp_path / "here" / "p.py").write_text(text)
    run = start(processes, "-p", "how=deaf", "-p", "count=20000")
    run.shows("<given>")

    run.press(CTRL_C)
    run.shows(r"finishing [\d,]+ accepted items")
    run.press(CTRL_C)

    assert run.ends() == 130
    assert len(run.letters()) == 20_000
    balanced(run, given=20_000)


def test_a_key_that_is_held_down_ends_the_run_and_leaves_nothing(
    backend: str, start: Start, gate: Gate
) -> None:
    run = start(backend, "-p", "how=gate")
    run.shows("<gate>")

    while run.process.poll() is None:
        run.press(CTRL_C)
        run.look()
        time.sleep(1 / 30)  # as keyboards do; keys that come at once are one signal

    # When only the interpreter's end is left, Ctrl-C is the interpreter's, with a traceback.
    assert run.ends_somehow() in (130, -signal.SIGINT)


def test_a_run_goes_on_after_it_was_suspended(processes: str, start: Start, gate: Gate) -> None:
    run = start(processes, "-p", "how=gate", "-p", "count=5")
    run.shows("<gate>", count=2)

    os.killpg(run.process.pid, signal.SIGSTOP)  # Ctrl-Z does nothing where no shell could say fg
    _, status = os.waitpid(run.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.killpg(run.process.pid, signal.SIGCONT)  # as fg does
    gate.open()

    assert run.ends() == 0
    assert run.done() == set(range(5))


# --- at any moment -------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["import", "resource"])
def test_ctrl_c_while_a_run_starts_ends_it(
    processes: str, moment: str, start: Start, gate: Gate, tmp_path: Path
) -> None:
    place = "pipeline = " if moment == "import" else "    yield 1\n"
    wait = 'os.write(1, b"<starting>\\n"); os.close(os.open("gate", os.O_RDONLY))'
    before = f"{wait}\n" if moment == "import" else f"    {wait}\n"
    (tmp_path / "here" / "p.py").write_text(PROGRAM.replace(place, before + place, 1))
    run = start(processes)
    run.shows("<starting>")

    run.press(CTRL_C)
    if moment == "resource":
        run.shows("interrupted; finishing")
        run.press(CTRL_C)

    assert run.ends() == 130
    assert run.done() == set()


def test_ctrl_c_before_a_command_begins_is_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_command, "invoke", interrupted)

    ended = CliRunner().invoke(main, ["run", "p.py"])

    assert (ended.exit_code, ended.stderr) == (130, "jobq: interrupted\n")


@pytest.mark.usefixtures("handlers_back")
def test_ctrl_c_in_the_conclusion_cuts_nothing_short(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobq.letters import Letters

    def interrupted(letters: Letters, codec: Any) -> Any:
        for event in decoded(letters, codec):
            signal.raise_signal(signal.SIGINT)
            yield event

    decoded = Letters.decoded
    monkeypatch.setattr(Letters, "decoded", interrupted)
    pipeline = ints(2)

    @pipeline.consumer
    def fail(number: int) -> None:
        raise ValueError(number)

    file = tmp_path / "dead"
    report = pipeline.run(backend=backend, dead_letters=file, check=False)

    assert len(file.read_text().splitlines()) == len(report.dead) == 2


def test_a_reader_that_leaves_half_way_ends_an_endless_run(backend: str, start: Start) -> None:
    reader, writer = os.pipe()
    run = start(backend, "-o", "-", output=writer)
    os.close(writer)

    assert os.read(reader, 2)
    os.close(reader)

    assert run.ends() == 141


# --- embedded ------------------------------------------------------------------------------------

EMBEDDED = """
import itertools, os, signal, sys, time
from collections.abc import Iterator
from jobq import Pipeline

pipeline = Pipeline("p")

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from itertools.count()

@pipeline.consumer(queue_size=20)
def work(number: int) -> int:
    if number == 0:
        os.write(1, b"begun\\n")
    return number

def mine(*_: object) -> None: ...

signal.signal(signal.SIGTERM, mine)
try:
    if sys.argv[2] == "run":
        pipeline.run(backend=sys.argv[1])
    else:
        for number in pipeline.stream(backend=sys.argv[1]):
            pass
except KeyboardInterrupt:
    back = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print("interrupted", back and signal.getsignal(signal.SIGTERM) is mine, signal.set_wakeup_fd(-1))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", ["run", "stream"])
def test_embedded_a_stopped_run_ends_with_keyboard_interrupt_and_handlers_are_back(
    backend: str, how: str, number: int, tmp_path: Path
) -> None:
    script = tmp_path / "embedded.py"
    script.write_text(EMBEDDED)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(script), backend, how], **pipes) as program:  # type: ignore[call-overload]  # keywords
        assert program.stdout.readline() == b"begun\n"

        program.send_signal(number)
        out, errors = program.communicate(timeout=PATIENCE)

    assert (out, errors, program.returncode) == (b"interrupted True -1\n", b"", 0)


def all_numbers() -> Iterator[int]:
    yield from itertools.count()


def same(number: int) -> int:
    return number


def endless() -> Pipeline:
    """Return a pipeline that any start method can run: the second of two streams finds the first's thread."""
    pipeline = Pipeline("endless")
    pipeline.producer(all_numbers)
    pipeline.consumer(same, workers=2, queue_size=50)
    return pipeline


@pytest.mark.usefixtures("handlers_back")
def test_the_third_ctrl_c_interrupts_a_loop_body_that_hangs(backend: str) -> None:
    with pytest.raises(KeyboardInterrupt), endless().stream(backend=backend) as stream:
        for _ in stream:
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
            pytest.fail("the loop's body went on")


@pytest.mark.usefixtures("handlers_back")
@pytest.mark.parametrize("order", [1, -1])
def test_streams_may_end_in_any_order(backend: str, order: int) -> None:
    streams = [endless().stream(backend=backend) for _ in range(3)]
    for stream in streams:
        next(stream)

    for stream in streams[::order]:
        stream.close()


def test_each_stream_in_progress_hears_ctrl_c(backend: str) -> None:
    with endless().stream(backend=backend) as one, endless().stream(backend=backend) as other:
        next(one), next(other)

        signal.raise_signal(signal.SIGINT)

        for stream in (one, other):
            with pytest.raises(KeyboardInterrupt):
                for _ in stream:
                    pass


FINISHED = """
import os, signal, sys
from collections.abc import Iterator
from jobq import Pipeline

pipeline, me, number = Pipeline("finished"), os.getpid(), getattr(signal, sys.argv[2])

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(3)

@pipeline.consumer(batch=10, batch_timeout=1000)
def work(all: list[int]) -> int:
    os.kill(me, number)  # the producers have ended: else the batch would be waited for
    return sum(all)

def mine(number, frame):
    print("heard")

if sys.argv[4] == "own":
    signal.signal(number, mine)
try:
    if sys.argv[3] == "run":
        print(pipeline.run(backend=sys.argv[1], collect=True).results)
    else:
        print(list(pipeline.stream(backend=sys.argv[1])))
    print("goes on")
except KeyboardInterrupt as interruption:
    print("interrupted", interruption.report.results, interruption.report.ok)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("how", ["run", "stream"])
@pytest.mark.parametrize("handler", ["default", "own"])
@pytest.mark.parametrize("backend", ["joinable", "thread"])
def test_embedded_a_signal_is_not_lost_though_all_work_was_done(
    backend: str, name: str, how: str, handler: str
) -> None:
    """A script that runs one pipeline after the other could else not be stopped."""
    ended = subprocess.run(
        [sys.executable, "-c", FINISHED, backend, name, how, handler],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    results = "[3]" if how == "run" else "[]"  # those of a stream are not in its report
    told = f"interrupted {results} True" if handler == "default" else "heard [3] goes on"
    assert (ended.stdout.split(), ended.stderr, ended.returncode) == (told.split(), "", 0)


@pytest.mark.usefixtures("handlers_back")
def test_a_signal_that_the_run_around_heard_is_told_by_that_one() -> None:
    pipeline = Pipeline("inner")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield 1

    @pipeline.consumer(batch=10, batch_timeout=1000)
    def work(all: list[int]) -> int:  # noqa: A002
        signal.raise_signal(signal.SIGINT)
        return sum(all)

    inner: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        for _ in endless().stream(backend="thread"):
            if not inner:
                inner += pipeline.run(backend="thread", collect=True).results

    assert inner == [1]


@pytest.mark.usefixtures("handlers_back")
@pytest.mark.parametrize("backend", ["joinable", "thread"])
def test_a_signal_is_not_lost_though_the_run_has_ended(backend: str) -> None:
    """All results lie there, and nobody is left who would stop for it."""
    pipeline = ints(20)
    pipeline.consumer(same)

    with pytest.raises(KeyboardInterrupt), pipeline.stream(backend=backend) as stream:
        next(stream)
        assert stream._thread is not None
        stream._thread.join()
        signal.raise_signal(signal.SIGTERM)


LEFT = """
import signal, sys, time
from collections.abc import Iterator
from jobq import Pipeline

pipeline = Pipeline("left")

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(1000)

def read(stream):
    for number in stream:
        if number == 5:
            signal.raise_signal(getattr(signal, sys.argv[2]))
            break

try:
    stream = pipeline.stream(backend=sys.argv[1])
    if sys.argv[3] == "with":
        with stream:
            read(stream)
    else:
        read(stream)
    while True:
        time.sleep(0.01)  # as any program that goes on
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("how", ["with", "for"])
def test_a_signal_is_not_lost_when_the_loop_is_left(backend: str, name: str, how: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LEFT, backend, name, how], capture_output=True, timeout=PATIENCE, check=False
    )

    assert (ended.stdout, ended.stderr, ended.returncode) == (b"interrupted\n", b"", 0)


@pytest.mark.usefixtures("handlers_back")
def test_a_stream_that_is_closed_by_another_thread_leaves_ctrl_c_to_the_program(backend: str) -> None:
    stream = endless().stream(backend=backend)
    next(stream)
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join(PATIENCE)

    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("handlers_back")
def test_ctrl_c_before_a_run_is_made_is_not_lost(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return prepare(*given, **options)

    monkeypatch.setattr("jobq.pipeline.prepare", interrupted)

    with pytest.raises(KeyboardInterrupt):
        endless().run(backend=backend)


@pytest.mark.usefixtures("handlers_back")
def test_ctrl_c_before_a_run_that_is_refused_interrupts_the_program(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        raise JobqError("no")

    monkeypatch.setattr("jobq.pipeline.prepare", refused)

    with pytest.raises(KeyboardInterrupt):
        endless().run(backend=backend)


def test_inline_a_job_sees_at_once_that_the_run_is_being_stopped() -> None:
    pipeline = ints(3)
    seen = []

    @pipeline.consumer
    def work(number: int, job: Job) -> None:
        before = job.stopping
        signal.raise_signal(signal.SIGTERM)
        seen.append((before, job.stopping))

    with contextlib.suppress(KeyboardInterrupt):
        pipeline.run(backend="inline", shutdown_timeout=60)

    assert seen[0] == (False, True)


# --- leaving half way ----------------------------------------------------------------------------


def by_break(stream: Any) -> None:
    for number in stream:
        if number >= 10:
            break


def by_close(stream: Any) -> None:
    next(stream)
    stream.close()


def by_dropping(stream: Any) -> None:
    next(stream)


def by_an_error(stream: Any) -> None:
    with contextlib.suppress(ZeroDivisionError):
        for _ in stream:
            raise ZeroDivisionError


def by_never_starting(stream: Any) -> None:
    iter(stream)


def by_closing_what_never_started(stream: Any) -> None:
    stream.close()


@pytest.mark.usefixtures("handlers_back")
@pytest.mark.parametrize(
    "leave",
    [by_break, by_close, by_dropping, by_an_error, by_never_starting, by_closing_what_never_started],
    ids=lambda leave: leave.__name__,
)
def test_a_stream_that_is_left_without_a_with_leaves_nothing(
    backend: str, leave: Callable[[Any], None]
) -> None:
    before = snapshot()

    leave(endless().stream(backend=backend))
    gc.collect()

    assert left_since(before) == {}


def keeping_notes(notes: Notes) -> Pipeline:
    """Return an endless pipeline whose workers note what they open and close."""
    pipeline = Pipeline("test")
    pipeline.producer(all_numbers)

    @pipeline.resource
    def opened() -> Iterator[int]:
        notes.add("opened")
        yield 1
        notes.add("closed")

    @pipeline.consumer(workers=2, queue_size=50)
    def work(number: int, opened: int) -> int:
        return number + opened

    return pipeline


@pytest.mark.parametrize("leave", [by_break, by_close, by_dropping, by_an_error])
def test_workers_close_what_they_have_opened_when_a_stream_is_left(
    backend: str, leave: Callable[[Any], None], notes: Notes
) -> None:
    leave(keeping_notes(notes).stream(backend=backend))
    gc.collect()

    lines = notes.lines()
    assert lines.count("opened") == lines.count("closed") > 0


def test_workers_close_what_they_have_opened_when_a_session_is_left_by_an_error(
    backend: str, notes: Notes
) -> None:
    with contextlib.suppress(ZeroDivisionError), keeping_notes(notes).open(backend=backend) as run:
        run.submit(1).result()
        raise ZeroDivisionError

    lines = notes.lines()
    assert lines.count("opened") == lines.count("closed") > 0


@pytest.mark.parametrize("backend", PROCESSES)
def test_a_stream_can_be_left_though_somebody_never_ends(backend: str, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    pipeline = Pipeline("test")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(3)
        gate.wait()

    @pipeline.consumer(workers=2)
    def work(number: int) -> int:
        if number == 1:
            gate.wait()
        return number

    with pipeline.stream(backend=backend) as stream:
        next(stream)

    assert stream.report is not None
    stage = stream.report.stages["work"]
    assert stage.done + stage.cancelled == stage.received


@pytest.mark.usefixtures("handlers_back")
@pytest.mark.parametrize("how", ["open", "stop", "stop at once"])
def test_ctrl_c_gets_through_who_leaves_while_a_resource_hangs(
    how: str, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline("test")

    @pipeline.resource
    def hanging() -> Iterator[int]:
        yield 1
        notes.add("closing")
        signal.pause()

    @pipeline.consumer
    def work(number: int, hanging: int) -> int:
        return number + hanging

    def interrupt() -> None:
        while not notes.lines():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    def strike_after(wake: Callable[[], None]) -> Callable[[], None]:
        def wake_and_strike() -> None:
            wake()
            interrupt()

        return wake_and_strike

    began, session = (
        time.monotonic(),
        pipeline.open(backend="pipe", start_method="fork", shutdown_timeout=1000),
    )
    with pytest.raises(KeyboardInterrupt), session as run:
        run.submit(1).result()
        thread = threading.Thread(target=interrupt)
        if how == "stop at once":
            inlet = run._inlet
            monkeypatch.setattr(inlet, "wake", strike_after(inlet.wake))
        else:
            thread.start()
        if how != "open":
            run.stop()
        raise ZeroDivisionError
    if how != "stop at once":
        thread.join()

    assert time.monotonic() - began < 500
    assert run.report is not None


def test_a_stream_that_nobody_reads_can_be_closed_while_it_waits(backend: str, notes: Notes) -> None:
    pipeline = Pipeline("test")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from itertools.count()

    @pipeline.consumer(queue_size=10)
    def work(number: int) -> int:
        notes.add(number)
        return number

    stream = pipeline.stream(backend=backend)
    next(stream)
    seen = -1
    while seen != (seen := len(notes.lines())):  # until it stands still
        time.sleep(0.05)
    stream.close()

    assert stream.report is not None
    stage = stream.report.stages["work"]
    assert stage.received == stage.done + stage.filtered + stage.dead + stage.cancelled


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


def test_a_log_of_a_stream_tells_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with endless().stream(backend="thread", log_level="info", log_format="console") as stream:
        next(stream)

    assert re.search(r"run \S+ ended after", capsys.readouterr().err)


def test_there_is_no_step_after_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    with endless().stream(backend="pipe", log_level="info", log_format="console") as stream:
        next(stream)
        running = stream._running
        assert running is not None
        for _ in range(5):
            running.driver.request_stop()

    told = capsys.readouterr().err
    assert told.count("killing the workers") == 1
    assert re.search(r"run \S+ ended after", told)


def test_ten_runs_in_one_process_need_no_more_than_one(backend: str) -> None:
    pipeline = ints(200)

    @pipeline.consumer(workers=2)
    def work(number: int) -> int:
        return number

    def rounds() -> None:
        pipeline.run(backend=backend, collect=True)
        with contextlib.suppress(ZeroDivisionError), pipeline.open(backend=backend) as run:
            run.submit(1).result()
            raise ZeroDivisionError
        by_break(pipeline.stream(backend=backend))

    rounds()
    gc.collect()
    before = snapshot()
    for _ in range(10):
        rounds()
    gc.collect()

    assert left_since(before) == {}
