"""The end of the program: whoever ends it, nothing is lost in silence and nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobq import Job, Pipeline
from jobq.testing import left_since, snapshot
from tests.faults.programs import (
    KEEP,
    NUMBERS,
    Ended,
    Program,
    assert_all_done,
    assert_row,
    each_backend,
    each_start,
    each_start_method,
    members,
    says,
    with_fault,
)
from tests.faults.rows import fault, out_of_reach, proves

pytestmark = [pytest.mark.slow]

ENDLESS = """
@pipeline.producer
def numbers() -> Iterator[int]:
    i = 0
    while True:
        yield i
        note("gave", i)
        i += 1
        time.sleep(0.001)

@pipeline.consumer(workers=2)
def work(i: int) -> object:
    note("did", i)
    return i
"""
STUCK = with_fault("signal.signal(signal.SIGTERM, signal.SIG_IGN); note('stuck', i); time.sleep(1000)")
#: A job that keeps the GIL: no thread of its worker runs.
DEAF = STUCK.replace("time.sleep(1000)", "import ctypes; ctypes.PyDLL(None).sleep(1000)")


def assert_given_is_done(ended: Ended) -> None:
    """All that the producer gave was worked on once."""
    given, did, kept = ended.noted("gave"), ended.noted("did"), ended.noted("kept")
    assert len(given) > 20
    assert set(given) <= set(did)
    assert sorted(did) == sorted(kept) == sorted(set(kept))


def strike(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send what a terminal sends: to the whole group."""
    os.killpg(process.pid, number)


# --- nothing is left in a buffer ------------------------------------------------------------------


@fault(
    "C1",
    "the run ends straight after large results",
    items="done; nothing is thrown away to end sooner",
    sees="nothing",
    exit=0,
)
@each_backend
def test_the_last_large_results_arrive_whole(program: Program, backend: str) -> None:
    ended = program.run(
        NUMBERS
        + """
@pipeline.consumer(workers=2)
def work(i: int) -> str:
    return chr(65 + i) * 500_000
""",
        "-b", backend, "-o", "out.jsonl",
    )  # fmt: skip

    assert_row("C1", ended)
    lines = (program.folder / "out.jsonl").read_text().splitlines()
    assert sorted(map(json.loads, lines)) == [chr(65 + i) * 500_000 for i in range(20)]


SCRIPT = """
@pipeline.consumer(workers=2)
def work(i: int) -> None:
    time.sleep(0.01)
    note("did", i)
    note("kept", i)

if __name__ == "__main__":
    ACT
"""


@fault(
    "C2",
    "the program's last line comes before the work is done",
    items="done: leaving `with pipeline.open()` waits for them",
    sees="nothing",
    exit=0,
)
@each_start_method
def test_the_end_of_the_program_waits_for_what_was_submitted(program: Program, method: str) -> None:
    act = f"with pipeline.open(start_method={method!r}) as run: [run.submit(i) for i in range(20)]"
    program.write(SCRIPT.replace("ACT", act))

    ended = program.end(program.launch("pipeline.py"))

    assert_row("C2", ended)
    assert_all_done(ended)
    assert ended.err == ""


@proves("C2")
def test_a_program_that_ends_without_closing_its_run_leaves_nothing(program: Program) -> None:
    act = "run = pipeline.open(); run.__enter__(); [run.submit(i) for i in range(20)]"
    program.write(SCRIPT.replace("ACT", act))

    ended = program.end(program.launch("pipeline.py"))

    assert ended.left == ()
    assert set(ended.noted("did")) <= {str(i) for i in range(20)}


@fault(
    "C3",
    "a worker ends with a file of the user's unflushed, or an `atexit` hook to run; "
    "or it is forked while the program has something in a buffer",
    items="done; a worker runs its hooks and flushes its files, and what the program had in a buffer is "
    "written once",
    sees="nothing",
    exit=0,
)
@each_start_method
def test_what_workers_and_program_have_in_buffers_is_written_once(program: Program, method: str) -> None:
    ended = program.run(
        NUMBERS
        + """
        import atexit, multiprocessing

        if multiprocessing.parent_process() is None:
            header = open(HERE / "header", "w")
            header.write("header\\n")
            print("header")

        @pipeline.resource
        def log() -> object:
            atexit.register(note, "atexit", os.getpid())
            return open(HERE / "log", "a")

        @pipeline.consumer(workers=2)
        def work(i: int, log: object) -> object:
            log.write(f"{i}\\n")
            print("printed", i)
            note("did", i)
            note("pid", os.getpid())
            return i
        """.replace("\n        ", "\n")
        + KEEP,
        "--start-method",
        method,
    )

    assert_row("C3", ended)
    assert_all_done(ended)
    numbers = sorted(map(str, range(20)))
    assert sorted((program.folder / "log").read_text().split()) == numbers
    assert sorted(ended.out.split("\n")) == ["", "header", *(f"printed {i}" for i in numbers)]
    assert (program.folder / "header").read_text() == "header\n"
    assert sorted(ended.noted("atexit")) == sorted(set(ended.noted("pid")))


@fault("C4", "a job leaves a thread that never ends", items="done", sees="nothing", exit=0)
@each_start_method
def test_a_thread_that_a_job_left_does_not_hold_up_the_end(program: Program, method: str) -> None:
    ended = program.run(
        with_fault("import threading; threading.Thread(target=time.sleep, args=(1000,)).start()"),
        "--start-method",
        method,
    )

    assert_row("C4", ended)
    assert_all_done(ended)


# --- the driver dies ------------------------------------------------------------------------------

BUSY = """
@pipeline.producer
def numbers() -> Iterator[int]:
    note("up", "numbers")
    yield from range(20)
    note("up", "numbers")
    time.sleep(1000)

@pipeline.consumer(source="numbers", workers=2)
def busy(i: int) -> None:
    note("up", "busy")
    import ctypes
    ctypes.PyDLL(None).sleep(1000)  # which keeps the GIL

@pipeline.consumer(source="numbers")
def idle(i: int) -> None:
    note("up", "idle")
"""


@fault(
    "C5",
    "SIGKILL of the program that runs the pipeline",
    items="lost, unless a journal has them",
    sees="nothing; its workers are gone within a second, under every start method",
    exit=137,
)
@each_start
def test_no_worker_outlives_its_driver(program: Program, options: tuple[str, str]) -> None:
    driver = program.start(BUSY, *options)
    program.until(lambda: len(program.noted("up")) >= 2 + 2 + 20)
    assert len(members({driver.pid})) >= 5

    driver.kill()

    assert_row("C5", program.end(driver))


#: Fault points: the driver's own code, with its death in it.
KILL_AT = """
import multiprocessing
from jobq import driver, pool

if multiprocessing.parent_process() is None:
    calls = []
    before = WHERE
    def act(*given):
        calls.append(1)
        if len(calls) == COUNT:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*given)
    WHERE = act
"""


@proves("C5")
@each_start_method
@pytest.mark.parametrize(
    ("where", "count"),
    [("pool.Pool._start", 3), ("driver.Driver._settle", 5), ("driver.Driver._ended", 2)],
    ids=["while it starts workers", "at an answer", "while it ends"],
)
def test_no_worker_outlives_a_driver_that_is_killed(
    program: Program, where: str, count: int, method: str
) -> None:
    source = KILL_AT.replace("WHERE", where).replace("COUNT", str(count)) + with_fault("pass")

    assert_row("C5", program.run(source, "--start-method", method))


@fault(
    "C16",
    "the program leaves by `os._exit()` in the middle of a run",
    items="lost, unless a journal has them",
    sees="nothing; its workers are gone within a second",
    exit=7,
)
@each_start_method
def test_no_worker_outlives_a_program_that_leaves_by_exit(program: Program, method: str) -> None:
    act = (
        f"run = pipeline.open(start_method={method!r}).__enter__(); run.submit(1); "
        "until(lambda: noted('did')); os._exit(7)"
    )
    program.write(SCRIPT.replace("ACT", act))

    assert_row("C16", program.end(program.launch("pipeline.py")))


# --- signals --------------------------------------------------------------------------------------


@fault(
    "C6",
    "SIGTERM to the program",
    items="what producers gave is done, for at most `--shutdown-timeout` seconds; then cancelled",
    sees="`terminated; …, press Ctrl-C again to stop now`",
    exit=143,
)
@each_backend
def test_sigterm_lets_the_run_finish_what_it_has(program: Program, backend: str) -> None:
    run = program.start(ENDLESS + KEEP, "-b", backend)
    program.until(lambda: len(program.noted("kept")) > 20)

    run.send_signal(signal.SIGTERM)

    ended = program.end(run)
    assert_row("C6", ended)
    assert_given_is_done(ended)


@fault(
    "C17",
    "SIGHUP to the program: its terminal is closed, or its connection lost",
    items="as with SIGTERM",
    sees="`the terminal was closed; …, press Ctrl-C again to stop now`",
    exit=129,
)
@each_start_method
def test_sighup_lets_the_run_finish_what_it_has(program: Program, method: str) -> None:
    run = program.start(ENDLESS + KEEP, "--start-method", method)
    program.until(lambda: len(program.noted("kept")) > 20)

    strike(run, signal.SIGHUP)

    ended = program.end(run)
    assert_row("C17", ended)
    assert_given_is_done(ended)


@fault(
    "C18",
    "SIGHUP to a program that was started by `nohup`",
    items="done",
    sees="nothing: what is ignored stays ignored",
    exit=0,
)
def test_a_run_under_nohup_goes_on(program: Program) -> None:
    program.write(with_fault("until(lambda: noted('struck'))"))
    run = program.execute("nohup", sys.executable, "-m", "jobq.cli", "run", "pipeline.py")
    program.until(lambda: "7" in program.noted("began"))

    strike(run, signal.SIGHUP)
    program.note("struck 1")

    ended = program.end(run)
    assert_row("C18", ended)
    assert_all_done(ended)


@fault(
    "C7",
    "Ctrl-C, which reaches the whole process group, with a producer that never ends",
    items="what producers gave is done: workers ignore SIGINT",
    sees="`interrupted; …, press Ctrl-C again to stop now`; no traceback",
    exit=130,
)
@each_start_method
def test_ctrl_c_lets_the_run_finish_what_it_has(program: Program, method: str) -> None:
    run = program.start(ENDLESS + KEEP, "--start-method", method)
    program.until(lambda: len(program.noted("kept")) > 20)

    strike(run, signal.SIGINT)

    ended = program.end(run)
    assert_row("C7", ended)
    assert_given_is_done(ended)
    assert "Traceback" not in ended.err


def letters(folder: Path) -> list[dict[str, Any]]:
    """Return the letters in the one file that the run has left."""
    (file,) = folder.glob("*.dead.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@fault(
    "C8",
    "Ctrl-C again and again",
    items="at the second, those in progress are stopped and written with the unstarted ones as cancelled; "
    "at the third workers are killed and nothing more is written",
    sees="`stopping the jobs in progress, 1 accepted item unfinished, press Ctrl-C again to kill the "
    "workers`; no traceback",
    exit=130,
)
@each_start_method
def test_the_second_ctrl_c_stops_jobs_in_progress_and_writes_them_down(program: Program, method: str) -> None:
    run = program.start(STUCK.replace("range(20)", "range(8)"), "--start-method", method)
    program.until(lambda: len(program.noted("kept")) == 7 and bool(program.noted("stuck")))

    strike(run, signal.SIGINT)
    program.until(lambda: program.said("finishing 1 accepted item"))
    strike(run, signal.SIGINT)

    ended = program.end(run)
    assert_row("C8", ended)
    assert "Traceback" not in ended.err
    assert [(letter["item"], letter["status"]) for letter in letters(program.folder)] == [(7, "cancelled")]


@proves("C8")
@each_backend
def test_a_storm_of_ctrl_c_ends_the_run(program: Program, backend: str) -> None:
    run = program.start(DEAF, "-b", backend)
    program.until(lambda: bool(program.noted("stuck")))

    def storm() -> bool:
        if run.poll() is None:
            strike(run, signal.SIGINT)
        return run.poll() is not None

    program.until(storm)

    ended = program.end(run)
    assert ended.code == 130
    assert ended.left == ()
    assert "Traceback" not in ended.err


@fault(
    "C9",
    "a worker is stopped that ignores SIGTERM and is stuck in C code, holding the GIL",
    items="cancelled, the one in hand and those that it had finished and could not tell",
    sees="`the time for finishing is over; stopping the jobs in progress, … accepted item… unfinished`",
    exit=143,
)
@each_start_method
def test_a_deaf_worker_is_killed_when_its_time_is_over(program: Program, method: str) -> None:
    run = program.start(DEAF, "--shutdown-timeout", "0.5", "--start-method", method)
    program.until(lambda: len(program.noted("did")) == 19 and bool(program.noted("stuck")))

    run.send_signal(signal.SIGTERM)

    ended = program.end(run)
    assert_row("C9", ended)
    cancelled = {letter["item"] for letter in letters(program.folder) if letter["status"] == "cancelled"}
    assert 7 in cancelled
    # What the worker had finished before, it could not tell.
    assert sorted([*map(int, ended.noted("kept")), *cancelled]) == list(range(20))


@fault(
    "C19",
    "Ctrl-C while the pipeline's file is imported",
    items="none was taken",
    sees="`jobq: interrupted`; no traceback",
    exit=130,
)
def test_ctrl_c_while_the_file_is_imported(program: Program) -> None:
    run = program.start("note('imported', 1)\ntime.sleep(1000)\n")
    program.until(lambda: bool(program.noted("imported")))

    strike(run, signal.SIGINT)

    ended = program.end(run)
    assert_row("C19", ended)
    assert "Traceback" not in ended.err


CLOSING = """
@pipeline.resource
def database() -> Iterator[int]:
    yield 1
    note("closing", os.getpid())
    until(lambda: noted("struck"))
    note("closed", os.getpid())

@pipeline.consumer
def work(i: int, database: int) -> object:
    note("did", i)
    return i
"""


@fault(
    "C20",
    "Ctrl-C when all is done and workers close their resources",
    items="done; resources are closed",
    sees="`interrupted; no accepted item is left, waiting for … to end`",
    exit=0,
)
def test_ctrl_c_at_the_end_changes_nothing(program: Program) -> None:
    run = program.start(NUMBERS + CLOSING + KEEP)
    program.until(lambda: bool(program.noted("closing")))

    strike(run, signal.SIGINT)
    program.until(lambda: program.said("interrupted"))
    program.note("struck 1")

    ended = program.end(run)
    assert_row("C20", ended)
    assert_all_done(ended)
    assert ended.noted("closed") == ended.noted("closing")


@fault(
    "C21",
    "Ctrl-\\\\ (SIGQUIT) to the whole group",
    items="lost, unless a journal has them",
    sees="nothing; all processes are gone at once",
    exit=131,
)
def test_sigquit_leaves_nothing_behind(program: Program) -> None:
    run = program.start(DEAF)
    program.until(lambda: bool(program.noted("stuck")))

    strike(run, signal.SIGQUIT)

    assert_row("C21", program.end(run))


@fault(
    "C22",
    "the program is suspended and continued: Ctrl-Z, `fg`",
    items="done",
    sees="nothing",
    exit=0,
)
@pytest.mark.parametrize("group", [True, False], ids=["with its workers", "alone"])
def test_a_suspended_program_goes_on_where_it_was(program: Program, group: bool) -> None:
    run = program.start(with_fault("until(lambda: noted('continued'))"))
    program.until(lambda: "7" in program.noted("began"))
    send = os.killpg if group else os.kill

    send(run.pid, signal.SIGSTOP)
    program.until(lambda: " T " in Path(f"/proc/{run.pid}/stat").read_text())
    program.note("continued 1")
    send(run.pid, signal.SIGCONT)

    ended = program.end(run)
    assert_row("C22", ended)
    assert_all_done(ended)


# --- nobody listens -------------------------------------------------------------------------------


def shell(program: Program, command: str) -> Ended:
    """Return how a command line of bash ended, JOBQ being ``jobq run`` on the program's file."""
    jobq = f"{sys.executable} -m jobq.cli run pipeline.py --log-format console"
    return program.end(program.execute("bash", "-c", command.replace("JOBQ", jobq)))


@fault(
    "C10",
    "standard output is closed: `jobq run … -o - | head`",
    items="what is left is cancelled",
    sees="no traceback",
    exit=141,
)
def test_a_reader_that_has_enough_ends_the_run(program: Program) -> None:
    program.write(ENDLESS)

    ended = shell(program, "JOBQ -o - | head -n 1; exit ${PIPESTATUS[0]}")

    assert_row("C10", ended)
    assert len(ended.out.splitlines()) == 1
    assert "Traceback" not in ended.err


@proves("C10")
def test_a_job_that_prints_to_nobody_has_failed(program: Program) -> None:
    program.write(with_fault("print('x', flush=True)"))

    ended = shell(program, "JOBQ | true; exit ${PIPESTATUS[0]}")

    assert ended.code == 1
    assert_all_done(ended, but={7})
    assert says("item 7 failed in stage work: BrokenPipeError: [Errno 32] Broken pipe", ended.err)


@fault(
    "C11",
    "the disk is full under the results",
    items="what is left is cancelled",
    sees="`jobq: results can't be written: No space left on device`",
    exit=3,
)
@pytest.mark.parametrize("where", ["-o - > /dev/full", "-o /dev/full"])
def test_a_full_disk_under_the_results_ends_the_run(program: Program, where: str) -> None:
    program.write(with_fault("pass").replace(KEEP, ""))

    assert_row("C11", shell(program, f"JOBQ {where}"))


@fault(
    "C23",
    "the disk is full under standard error, where the log goes",
    items="done",
    sees="nothing: what can't be written is not",
    exit=0,
)
def test_a_full_disk_under_the_log_stops_nobody(program: Program) -> None:
    program.write(with_fault('if first("fault"): die()'))

    ended = shell(program, "JOBQ -v 2> /dev/full")

    assert_row("C23", ended)
    assert_all_done(ended)


@fault(
    "C24",
    "the disk is full under the dead letters",
    items="dead, but not in the file",
    sees="`No space left on device`",
    exit=1,
)
def test_a_full_disk_under_the_dead_letters_is_told(program: Program) -> None:
    program.write(with_fault("raise ValueError('bad')"))

    ended = shell(program, "JOBQ --dead-letters /dev/full")

    assert_row("C24", ended)
    assert_all_done(ended, but={7})


# --- nothing is left ------------------------------------------------------------------------------

NAMED = """
import multiprocessing
multiprocessing.current_process()._config["semprefix"] = "/NAME"
"""


@fault(
    "C12",
    "the end, however it comes, may leave named semaphores and shared memory",
    items="done",
    sees="nothing: no name is in /dev/shm, whether a worker or the program is killed",
    exit=0,
)
@each_start
def test_no_names_are_left(program: Program, options: tuple[str, str]) -> None:
    name = f"jobq{uuid.uuid4().hex[:8]}"
    source = NAMED.replace("NAME", name) + with_fault('if first("fault"): die()')

    ended = program.run(source, *options)

    assert_row("C12", ended)
    assert_all_done(ended)
    assert list(Path("/dev/shm").glob(f"*{name}*")) == []
    assert "leaked" not in ended.err


@proves("C12")
@each_start_method
def test_no_names_are_left_by_a_driver_that_is_killed(program: Program, method: str) -> None:
    name = f"jobq{uuid.uuid4().hex[:8]}"
    run = program.start(NAMED.replace("NAME", name) + DEAF, "--start-method", method)
    program.until(lambda: bool(program.noted("stuck")))

    run.kill()

    ended = program.end(run)
    assert ended.left == ()
    assert list(Path("/dev/shm").glob(f"*{name}*")) == []
    assert "leaked" not in ended.err


@proves("C12")
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_killed_resource_tracker_is_missed_by_nobody(program: Program, method: str) -> None:
    run = program.start(with_fault("until(lambda: noted('killed'))"), "--start-method", method)
    program.until(lambda: "7" in program.noted("began"))

    trackers = [
        pid
        for pid in members({run.pid})
        if b"resource_tracker import main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    for pid in trackers:
        os.kill(pid, signal.SIGKILL)
    program.note("killed 1")

    ended = program.end(run)
    assert trackers
    assert_row("C12", ended)
    assert_all_done(ended)
    assert "Traceback" not in ended.err


@pytest.mark.usefixtures("no_leaks")
@fault(
    "C13",
    "many runs in one process",
    items="done",
    sees="nothing: no descriptor, process or thread more after each",
)
@each_backend
def test_many_runs_in_one_process_leave_nothing(backend: str, tmp_path: Path) -> None:
    pipeline = Pipeline("again")

    @pipeline.producer
    def numbers() -> Iterator[int]:
        yield from range(5)

    @pipeline.consumer(workers=2)
    def work(i: int, job: Job) -> None:
        if i == 3 and job.delivery == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / f"{i} {os.getpid()}").touch()

    pipeline.run(backend=backend)
    before = snapshot()

    for _ in range(10):
        pipeline.run(backend=backend)
        assert left_since(before) == {}

    assert len({path.name.split()[0] for path in tmp_path.iterdir()}) == 5


@fault(
    "C14",
    'the process that holds the resources of `scope="run"` is killed',
    items="what is left is cancelled",
    sees="`jobq: the keeper of the run-scoped resources was killed by SIGKILL; giving up, 12 jobs "
    "unfinished`",
    exit=3,
)
@each_backend
def test_a_killed_keeper_ends_the_run(program: Program, backend: str) -> None:
    ended = program.run(
        NUMBERS
        + """
        class Account:
            def pid(self) -> int:
                return os.getpid()

        @pipeline.resource(scope="run")
        def account() -> Account:
            return Account()

        @pipeline.consumer(workers=2)
        def work(i: int, account: Account) -> object:
            pid = account.pid()
            if i == 7:
                os.kill(pid, signal.SIGKILL)
                time.sleep(1000)
            note("did", i)
            return i
        """.replace("\n        ", "\n")
        + KEEP,
        "-b",
        backend,
    )

    assert_row("C14", ended)
    statuses = {letter["item"]: letter["status"] for letter in letters(program.folder)}
    assert statuses[7] == "cancelled"
    lost = {str(i) for i in range(20)} - set(ended.noted("did")) - {str(item) for item in statuses}
    assert not lost


@fault(
    "C15",
    "a run begins when the interpreter is ending already, in an `atexit` hook",
    items="done",
    sees="nothing; with forkserver and spawn it is refused, since the main program is no file any more",
    exit=0,
)
@pytest.mark.parametrize("how", ["run", "open"])
@each_start_method
def test_a_run_in_an_exit_hook_works_or_is_refused(program: Program, method: str, how: str) -> None:
    given = f"start_method={method!r}"
    acts = {
        "run": f"pipeline.run({given})",
        "open": f"with pipeline.open({given}) as run: [run.submit(i) for i in range(20)]",
    }
    program.write(
        NUMBERS
        + SCRIPT.replace("ACT", "atexit.register(late)").replace(
            "if __name__", f"import atexit\ndef late():\n    {acts[how]}\n\nif __name__"
        )
    )

    ended = program.end(program.launch("pipeline.py"))

    assert_row("C15", ended)
    if method == "fork":
        assert_all_done(ended)
        assert ended.err == ""
    else:
        assert ended.noted("did") == []
        assert says("can't be found by name in a worker under start_method=", ended.err)


out_of_reach(
    "C25",
    "the disk is full under the journal",
    why="there is no journal yet",
    items="what is left is cancelled",
)
