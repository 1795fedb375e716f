"""Programs that jobs start: none of them goes on when its worker has ended, or the run."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobq.backends import descendants
from jobq.backends.descendants import GIVING_UP, Leftovers, mark, marked, new_number
from tests.faults.programs import (
    SURVIVAL,
    Ended,
    Program,
    assert_row,
    each_start_method,
    patiently,
)
from tests.faults.rows import fault, out_of_reach, proves

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found by what Linux tells of them"),
]

#: Ways to start a program: a shell with a child, one that is deaf to SIGTERM, a daemon of its own session,
#: with another parent and environment.
PROGRAMS = """
import subprocess

def program(words):
    return subprocess.Popen(["sh", "-c", f"cd {HERE}; echo program $$ >> notes; {words}"])

def loop(name):
    return program("while :; do sleep 1000; done")

def deaf(name):
    return program("trap '' TERM; while :; do sleep 1000; done")

def daemon(name):
    words = f"cd {HERE}; sh -c 'echo program $$ >> notes; exec sleep 1000' &"
    subprocess.run(["sh", "-c", words], start_new_session=True, env={"PATH": os.environ["PATH"]})

def programs(count=1):
    until(lambda: len(noted("program")) >= count)
    return list(map(int, noted("program")))

def runs(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(COUNT)
"""
each_program = pytest.mark.parametrize("kind", ["loop", "deaf", "daemon"])


def pipeline(job: str, *, count: int = 1, **options: object) -> str:
    """Return a pipeline whose job of each of *count* items is *job*."""
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    body = "".join(f"    {line}\n" for line in job.strip().splitlines())
    text = f"@pipeline.consumer({given})\ndef work(i: int, job: Job) -> None:\n{body}"
    return PROGRAMS.replace("COUNT", str(count)) + "\n" + text


def runs(pid: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def children(pid: int) -> list[str]:
    """Return the numbers of the processes that *pid* is the parent of."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def programs(program: Program, count: int = 1) -> list[int]:
    """Return the programs that jobs started, when there are so many."""
    program.until(lambda: len(program.noted("program")) >= count)
    return list(map(int, program.noted("program")))


def assert_gone(program: Program, ended: Ended | None = None) -> None:
    """No program that a job started outlives the run, whatever session it is in."""
    pids = programs(program)
    assert patiently(lambda: not any(map(runs, pids)), SURVIVAL), "a program outlived the run"
    assert not (program.left() if ended is None else ended.left)


# ── a worker ends before the run ──────────────────────────────────────────────────────────────────────

#: The next try waits until the first one's program has gone.
ALONE = """
if job.attempt == 1 and job.delivery == 1:
    KIND(i)
    programs()
    END
until(lambda: not any(map(runs, programs())))
"""


@fault(
    "D16",
    "a job runs a program, and its worker is stopped at its time limit, or killed",
    items="again",
    sees="nothing of the program: whatever descends from a worker that has ended, daemons too, is ended by "
    "SIGTERM, and half a second later by SIGKILL",
    exit=0,
)
@each_program
@each_start_method
def test_a_program_does_not_run_beside_the_retry_of_its_job(program: Program, method: str, kind: str) -> None:
    text = ALONE.replace("KIND", kind).replace("END", "time.sleep(1000)")
    ended = program.run(pipeline(text, timeout=2, max_retries=1), "--start-method", method)

    assert_row("D16", ended)
    assert "TimeLimitExceeded" in ended.err
    assert_gone(program, ended)


@proves("D16")
@each_program
@each_start_method
def test_a_program_does_not_outlive_its_killed_worker(program: Program, method: str, kind: str) -> None:
    text = ALONE.replace("KIND", kind).replace("END", "die()")
    ended = program.run(pipeline(text), "--start-method", method)

    assert_row("D16", ended)
    assert "was killed by SIGKILL" in ended.err
    assert_gone(program, ended)


@proves("D16")
def test_a_program_does_not_outlive_a_worker_without_a_keeper(program: Program) -> None:
    text = ALONE.replace("KIND", "deaf").replace("END", "die()")

    ended = program.run(pipeline(text), "--start-method", "forkserver")

    assert_row("D16", ended)
    assert_gone(program, ended)


@proves("D16")
def test_a_program_does_not_outlive_a_worker_whose_keeper_was_killed(program: Program) -> None:
    text = ALONE.replace("KIND", "loop").replace("END", "os.kill(os.getppid(), signal.SIGKILL); die()")
    ended = program.run(pipeline(text), "--start-method", "fork")

    assert_row("D16", ended)
    assert "ended, how is not known" in ended.err
    assert_gone(program, ended)


@proves("D16")
def test_a_deaf_program_does_not_outlive_the_run_whose_keeper_was_killed_meanwhile(program: Program) -> None:
    # It has half a second after SIGTERM; the keeper, which would then kill it, doesn't.
    text = """
if job.delivery == 1:
    deaf(i)
    programs()
    die()
os.kill(os.getppid(), signal.SIGKILL)
"""
    ended = program.run(pipeline(text), "--start-method", "fork")

    assert_row("D16", ended)
    assert_gone(program, ended)


@proves("D16")
@each_start_method
def test_the_programs_of_a_run_within_a_job_do_not_outlive_its_worker(program: Program, method: str) -> None:
    hang = """
def hang(i: int) -> None:
    deaf(i).wait()

"""
    text = ALONE.replace("KIND(i)", f"list(jobq.map(hang, [0], start_method={method!r}))")
    text = pipeline(text.replace("END", ""), timeout=4, max_retries=1, daemon=False)

    ended = program.run("import jobq\n" + hang + text, "--start-method", "fork")

    assert_row("D16", ended)
    assert "TimeLimitExceeded" in ended.err
    assert_gone(program, ended)


@proves("D16")
@each_start_method
def test_the_programs_of_other_workers_are_left_alone(program: Program, method: str) -> None:
    # The second worker's program goes; the first one's daemon, a child of nobody by then, must not.
    text = """
if i == 0:
    daemon(i)
    (mine,) = programs()
    note("mine", mine)
    until(lambda: noted("ended"))
    assert runs(mine)
elif job.delivery == 1:
    until(lambda: noted("mine"))
    loop(i)
    programs(2)
    die()
else:
    (mine,) = map(int, noted("mine"))
    until(lambda: not any(runs(pid) for pid in programs(2) if pid != mine))
    note("ended", i)
"""
    ended = program.run(pipeline(text, count=2, workers=2), "--start-method", method)

    assert_row("D16", ended)
    assert_gone(program, ended)


@proves("D16")
@each_start_method
def test_what_a_killed_job_left_to_be_cleaned_up_is_cleaned_up(program: Program, method: str) -> None:
    # By multiprocessing's resource tracker, a program that the job starts here. It ignores SIGTERM.
    text = """
if job.delivery == 1:
    from multiprocessing import resource_tracker, shared_memory
    memory = shared_memory.SharedMemory(f"tests-{os.getpid()}", create=True, size=100)
    note("program", resource_tracker._resource_tracker._pid or os.getpid())
    note("memory", memory.name)
    die()
"""
    ended = program.run(pipeline(text), "--start-method", method)

    assert_row("D16", ended)
    (name,) = ended.noted("memory")
    assert not Path("/dev/shm", name).exists()
    assert_gone(program, ended)


# ── a worker ends as it should ────────────────────────────────────────────────────────────────────────


@fault(
    "D17",
    "a job leaves a program, or a daemon, that it started",
    items="done",
    sees="nothing; it goes on until its worker ends, with the run or to be replaced: then it has half a "
    "second, then comes SIGTERM, and half a second later SIGKILL",
    exit=0,
)
@each_program
@each_start_method
def test_a_program_that_a_job_left_ends_with_the_run(program: Program, method: str, kind: str) -> None:
    text = f"if i == 0: {kind}(i)\nassert any(map(runs, programs()))"
    ended = program.run(pipeline(text, count=5), "--start-method", method)

    assert_row("D17", ended)
    assert_gone(program, ended)


@proves("D17")
@each_start_method
def test_a_program_that_nobody_waits_for_may_finish(program: Program, method: str) -> None:
    """As `gzip` does that was given all its input: it is not asked to end while it may do so by itself."""
    text = "program(\"trap 'exit 1' TERM; sleep 0.2; echo finished >> notes\")\nprograms()"
    ended = program.run(pipeline(text), "--start-method", method)

    assert_row("D17", ended)
    assert_gone(program, ended)
    assert "finished" in (program.folder / "notes").read_text().splitlines()


@proves("D17")
@each_start_method
def test_a_program_ends_with_a_worker_that_is_replaced(program: Program, method: str) -> None:
    text = "if i == 0: loop(i)\nelse: until(lambda: not any(map(runs, programs())))"
    ended = program.run(pipeline(text, count=3, max_tasks_per_worker=1), "--start-method", method)

    assert_row("D17", ended)
    assert_gone(program, ended)


@proves("D17")
@each_start_method
def test_the_program_s_own_children_are_left_alone(program: Program, method: str) -> None:
    text = (
        pipeline("loop(i)\nprograms(2)\ndie()", max_deliveries=1)
        + f"""
if __name__ == "__main__":
    own = program("exec sleep 1000")
    programs()
    report = pipeline.run(check=False, start_method={method!r})
    assert report.stages["work"].dead == 1
    assert own.poll() is None
    own.kill()
    own.wait()
"""
    )
    program.write(text)

    ended = program.end(program.launch("pipeline.py"))

    assert ended.code == 0, ended.err
    assert_gone(program, ended)


# ── the run ends before its jobs ──────────────────────────────────────────────────────────────────────

HANGS = "KIND(i)\nprograms()\nnote('keeper', os.getppid())\ntime.sleep(1000)"


@fault(
    "C26",
    "jobs run programs when Ctrl-C is pressed, once and again",
    items="at the first done, at the second cancelled",
    sees="nothing of the programs: Ctrl-C does not reach those that jobs start (they inherit that SIGINT and "
    "SIGHUP are ignored), so that the jobs can finish; the second one ends them with their workers",
    exit=130,
)
@each_program
@each_start_method
def test_the_second_ctrl_c_ends_the_programs_too(program: Program, method: str, kind: str) -> None:
    process = program.start(pipeline(HANGS.replace("KIND", kind)), "--start-method", method)
    started = programs(program)
    os.killpg(process.pid, signal.SIGINT)
    program.until(lambda: program.said("interrupted; finishing 1 accepted item"))
    assert any(map(runs, started))
    os.killpg(process.pid, signal.SIGINT)

    ended = program.end(process)

    assert_row("C26", ended)
    assert_gone(program, ended)


@fault(
    "C27",
    "SIGKILL of the program that runs the pipeline, while jobs run programs of their own",
    items="lost, unless a journal has them",
    sees="nothing; the programs are gone within a second where workers were forked",
    exit=137,
)
@each_program
def test_programs_do_not_outlive_a_driver_that_is_killed(program: Program, kind: str) -> None:
    process = program.start(pipeline(HANGS.replace("KIND", kind)), "--start-method", "fork")
    programs(program)
    process.kill()

    ended = program.end(process)

    assert_row("C27", ended)
    assert_gone(program, ended)


@proves("C27")
def test_programs_end_though_the_keeper_was_suspended_when_the_driver_was_killed(program: Program) -> None:
    process = program.start(pipeline(HANGS.replace("KIND", "loop")), "--start-method", "fork")
    program.until(lambda: bool(program.noted("keeper")))
    os.kill(int(program.noted("keeper")[0]), signal.SIGSTOP)
    process.kill()

    assert_gone(program, program.end(process))


@proves("C27")
def test_programs_end_though_only_the_spare_is_left_when_the_driver_is_killed(program: Program) -> None:
    process = program.start(pipeline(HANGS.replace("KIND", "loop")), "--start-method", "fork")
    program.until(lambda: bool(program.noted("keeper")))
    (keeper,) = map(int, program.noted("keeper"))
    program.until(lambda: len(children(keeper)) == 3)  # two workers, and the spare, which is forked last
    os.kill(keeper, signal.SIGKILL)
    process.kill()

    assert_gone(program, program.end(process))


@proves("C27")
def test_programs_end_though_their_keeper_was_killed_before_the_driver(program: Program) -> None:
    # The second item's worker dies with the keeper, and is replaced by the spare, which then keeps both.
    text = """
if i == 0:
    loop(i)
    note("up", i)
elif job.delivery == 1:
    until(lambda: noted("up"))
    os.kill(os.getppid(), signal.SIGKILL)
    die()
else:
    note("replaced", i)
time.sleep(1000)
"""
    process = program.start(pipeline(text, count=2, workers=2), "--start-method", "fork")
    program.until(lambda: bool(program.noted("replaced")))
    process.kill()

    assert_gone(program, program.end(process))


out_of_reach(
    "C28",
    "SIGKILL of the program while jobs run programs, with forkserver or spawn",
    items="lost, unless a journal has them",
    sees="the workers are gone within a second, what they started is not",
    why="with these, whoever could see to it is not jobq's (the fork server) or dies itself; with fork it is "
    "seen to, and with all of them where the program ends in any other way",
)


# ── who is ended, and who is not ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that no worker has started."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def test_a_number_that_has_become_another_s_is_not_killed(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descendants, "marked", lambda _: iter([(sleeper.pid, 7)]))
    leftovers = Leftovers(new_number())
    leftovers.add(7, grace=0.0)

    leftovers.look()

    assert leftovers.due is None
    assert sleeper.poll() is None


@pytest.fixture
def marked_sleeper() -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The number of a run, and what a worker of it has started, whose own number is that of the sleeper."""
    run = new_number()
    with subprocess.Popen(["sleep", "1000"], preexec_fn=lambda: mark(run)) as process:  # noqa: PLW1509
        yield run, process
        process.kill()


def test_what_carries_a_mark_is_found_by_its_run_only(
    marked_sleeper: tuple[int, subprocess.Popen[bytes]],
) -> None:
    run, process = marked_sleeper

    assert list(marked(run)) == [(process.pid, process.pid)]
    assert list(marked(new_number())) == []


def test_a_limit_that_was_set_before_is_kept() -> None:
    run = new_number()

    def set_up() -> None:
        resource.setrlimit(resource.RLIMIT_RTTIME, (1_000_000, 2_000_000))
        mark(run)

    with subprocess.Popen(["sleep", "1000"], preexec_fn=set_up) as process:  # noqa: PLW1509
        limits = resource.prlimit(process.pid, resource.RLIMIT_RTTIME)
        process.kill()

    assert limits == (1_000_000, 2_000_000)


def test_of_workers_that_have_not_ended_nothing_is_touched(
    marked_sleeper: tuple[int, subprocess.Popen[bytes]],
) -> None:
    run, process = marked_sleeper
    leftovers = Leftovers(run)
    leftovers.add(process.pid + 1, grace=0.0)

    leftovers.look()

    assert leftovers.due is None
    assert process.poll() is None


def test_a_worker_that_has_the_number_of_an_earlier_one_is_left_alone(
    marked_sleeper: tuple[int, subprocess.Popen[bytes]],
) -> None:
    run, process = marked_sleeper
    leftovers = Leftovers(run)
    leftovers.add(process.pid, grace=0.0)
    leftovers.keep(process.pid)

    leftovers.look()

    assert leftovers.due is None
    assert process.poll() is None


def test_what_is_left_is_asked_once_then_killed_and_given_up_in_the_end(
    marked_sleeper: tuple[int, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, process = marked_sleeper
    now, sent = 100.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda _, number: sent.append(number))
    leftovers = Leftovers(run)
    assert leftovers.due is None
    leftovers.add(process.pid)
    assert leftovers.due == now

    for later, due in ((0.0, 100.5), (0.2, 100.5), (0.3, 100.51), (GIVING_UP, None)):
        now += later
        leftovers.look()
        assert leftovers.due == (None if due is None else pytest.approx(due))

    assert sent == [signal.SIGTERM, signal.SIGKILL]


def test_what_has_ended_is_not_waited_for(marked_sleeper: tuple[int, subprocess.Popen[bytes]]) -> None:
    run, process = marked_sleeper
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # nobody has reaped it: it has its mark still

    Leftovers(run).finish()


def test_without_descriptors_of_processes_nothing_is_touched(
    marked_sleeper: tuple[int, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, process = marked_sleeper
    monkeypatch.delattr(os, "pidfd_open")

    Leftovers(run).finish()

    assert process.poll() is None
