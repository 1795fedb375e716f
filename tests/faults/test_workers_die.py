"""A worker dies or stops: nothing is lost, by the evidence of what jobs wrote."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from jobq import Pipeline
from tests.faults.programs import (
    KEEP,
    NUMBERS,
    WORK,
    Program,
    assert_all_done,
    assert_row,
    each_backend,
    each_start,
    each_start_method,
    says,
    with_fault,
)
from tests.faults.rows import fault, proves

pytestmark = [pytest.mark.slow]

#: A program that kills a worker which has nothing to do: what it gave has arrived at the next stage.
IDLE = (
    """
@pipeline.producer
def numbers() -> Iterator[int]:
    yield from (0, 1)
    until(lambda: len(noted("kept")) == 2)
    os.kill(int(noted("pid")[0]), signal.SIGKILL)
    yield from range(2, 20)

@pipeline.consumer(workers=2)
def work(i: int) -> object:
    if i < 2:
        note("pid", os.getpid())
        until(lambda: len(noted("pid")) == 2)  # so each worker has one
    note("did", i)
    return i
"""
    + KEEP
)


# --- the instants ---------------------------------------------------------------------------------


@fault(
    "A1",
    "SIGKILL while it waits for work",
    items="done",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL`",
    exit=0,
)
@each_backend
def test_an_idle_worker_that_is_killed_starves_nobody(program: Program, backend: str) -> None:
    ended = program.run(IDLE, "-b", backend)

    assert_row("A1", ended)
    assert_all_done(ended)
    assert "while on item" not in ended.err


@fault(
    "A2",
    "SIGKILL between taking a job from the queue and beginning it",
    items="again",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL…`",
    exit=0,
)
@each_backend
def test_a_job_that_was_received_and_not_begun_is_not_lost(program: Program, backend: str) -> None:
    ended = program.run(
        """
        class Number:
            def __init__(self, i):
                self.i = i
            def __setstate__(self, state):
                if state["i"] == 7 and first("fault"):
                    die()
                self.__dict__ = state

        @pipeline.producer
        def numbers() -> Iterator[Number]:
            for i in range(20):
                yield Number(i)

        @pipeline.consumer(workers=2)
        def work(number: Number) -> object:
            note("did", number.i)
            return number.i
        """
        + KEEP.replace("\n", "\n        "),
        "-b",
        backend,
    )

    assert_row("A2", ended)
    assert_all_done(ended)


@fault(
    "A3",
    "SIGKILL in the middle of a job",
    items="again",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL while on item 7; "
    "the item goes to another worker, attempt 2 of 3`",
    exit=0,
)
@each_backend
def test_a_job_whose_worker_is_killed_goes_to_another(program: Program, backend: str) -> None:
    ended = program.run(with_fault('if first("fault"): die()'), "-b", backend)

    assert_row("A3", ended)
    assert_all_done(ended)
    assert ended.noted("began").count("7") == 2


@proves("A3")
@each_start_method
def test_it_is_the_same_with_every_start_method(program: Program, method: str) -> None:
    ended = program.run(with_fault('if first("fault"): die()'), "--start-method", method)

    assert_row("A3", ended)
    assert_all_done(ended)


@fault(
    "A4",
    "SIGKILL when the work is done and its answer has not left",
    items="again, so side effects happen twice: `job.id` is the same and `job.delivery` is 2",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL while on item 7; "
    "the item goes to another worker, attempt 2 of 3`",
    exit=0,
)
@each_backend
def test_a_job_that_was_done_and_not_answered_enters_the_next_stage_once(
    program: Program, backend: str
) -> None:
    ended = program.run(
        """
        class Deadly:
            def __reduce__(self):
                if first("fault"):
                    die()
                return int, (7,)
        """
        + with_fault('note("did", i); note("id", job.id, job.delivery); return Deadly()').replace(
            "\n", "\n        "
        ),
        "-b",
        backend,
    )

    assert_row("A4", ended)
    assert_all_done(ended)
    assert ended.noted("did").count("7") == 2
    (one, first), (other, second) = (line.split() for line in ended.noted("id"))
    assert (one, first, second) == (other, "1", "2")


#: Fault points: the code of a worker's channel, with a death in it.
HALF_AN_ANSWER = """
from multiprocessing import current_process
from jobq.backends import child

whole = child.write_whole

def half(fd, buffers):
    data = b"".join(buffers)
    if len(data) > 1_000_000 and current_process().name.startswith("work") and first("fault"):
        os.write(fd, data[: len(data) // 2])
        die()
    whole(fd, buffers)

child.write_whole = half
"""
HALF_AN_ORDER = """
from multiprocessing import current_process
from jobq.backends.channel import Incoming

read = Incoming.read

def half(self, *given):
    count = read(self, *given)
    if self._large is not None and current_process().name.startswith("work") and first("fault"):
        die()
    return count

Incoming.read = half
"""
#: An item of 3 MB that goes through the pipe: no file may be so large, nor then the shared memory.
LARGE = """
import resource

resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

@pipeline.producer
def numbers() -> Iterator[bytes]:
    for i in range(20):
        yield i.to_bytes(1) * (3_000_000 if i == 7 else 1)

@pipeline.consumer(workers=2)
def work(data: bytes) -> bytes:
    note("did", data[0])
    return data

@pipeline.consumer
def keep(data: bytes) -> None:
    note("kept", data[0])
    note("size", len(data))
"""


@fault(
    "A5",
    "SIGKILL half way through an answer, which the standard queue writes holding a lock that all share",
    items="again; half an answer counts as none",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL…`",
    exit=0,
)
@each_backend
def test_half_an_answer_counts_as_none_and_blocks_nobody(program: Program, backend: str) -> None:
    ended = program.run(HALF_AN_ANSWER + LARGE, "-b", backend)

    assert_row("A5", ended)
    assert_all_done(ended)
    assert ended.noted("size").count("3000000") == 1


@fault(
    "A20",
    "SIGKILL half way through reading a job of 3 MB",
    items="again",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL…`",
    exit=0,
)
@each_backend
def test_half_a_job_is_read_by_nobody_else(program: Program, backend: str) -> None:
    ended = program.run(HALF_AN_ORDER + LARGE, "-b", backend)

    assert_row("A20", ended)
    assert_all_done(ended)
    assert ended.noted("size").count("3000000") == 1


@pytest.mark.usefixtures("no_leaks")
@fault(
    "A6",
    "workers are killed while somebody sleeps in `join()`",
    items="again",
    sees="`run.join()` returns when everything is settled: it waits in the calling process only, "
    "for counts that no other process can hold",
)
@each_backend
def test_join_returns_though_workers_die_meanwhile(backend: str, tmp_path: Path) -> None:
    pipeline = Pipeline("joined")

    @pipeline.consumer(workers=2, max_deliveries=1)
    def work(i: int) -> None:
        marker = tmp_path / str(i)
        if i % 5 == 0 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        marker.touch()

    with pipeline.open(backend=backend, check=False) as run:
        for i in range(20):
            run.submit(i)
        run.join(timeout=30)

    assert {path.name for path in tmp_path.iterdir()} == {str(i) for i in range(20)}


# --- what kills -----------------------------------------------------------------------------------


@fault(
    "A7",
    "the kernel kills it for want of memory",
    items="again",
    sees="`was killed by SIGKILL (out of memory?) while on item 7`, "
    "where the kernel's count of such kills for our control group has grown",
    exit=0,
)
def test_a_kill_for_want_of_memory_is_guessed(program: Program) -> None:
    (program.folder / "memory.events").write_text("oom 0\noom_kill 0\n")

    ended = program.run(
        """
        from jobq.backends import processes

        processes.events_file = lambda: HERE / "memory.events"
        """
        + with_fault(
            """
            if first("fault"):
                (HERE / "memory.events").write_text("oom 1\\noom_kill 1\\n")
                die()
            """
        ).replace("\n", "\n        ")
    )

    assert_row("A7", ended)
    assert_all_done(ended)


#: Reads memory beyond the end of its file.
BUS_ERROR = """
    import mmap
    file = open(HERE / "x", "wb+")
    file.truncate(1)
    memory = mmap.mmap(file.fileno(), 1)
    file.truncate(0)
    memory[0]
"""


@fault(
    "A8",
    "segmentation fault, abort, bus error",
    items="again",
    sees="where it was, by Python's faulthandler: `Fatal Python error` … `in work`; and "
    "`worker 1 of stage work (pid 4711) was killed by SIG… while on item 7; "
    "the item goes to another worker, attempt 2 of 3`",
    exit=0,
)
@pytest.mark.parametrize(
    ("crash", "by"),
    [
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("os.abort()", "SIGABRT"),
        (
            BUS_ERROR,
            "SIGBUS",
        ),
    ],
    ids=["segmentation fault", "abort", "bus error"],
)
def test_a_crash_in_c_code_is_named_with_its_place(program: Program, crash: str, by: str) -> None:
    ended = program.run(with_fault(f'if first("fault"):\n    {crash.strip()}'))

    assert_row("A8", ended)
    assert_all_done(ended)
    assert says(f"was killed by {by} while on item 7", ended.err)


@fault(
    "A9",
    "`os._exit(0)` in a job",
    items="again: an end that nobody asked for is a death, whatever its code",
    sees="`worker 1 of stage work (pid 4711) exited with code 0 in the middle of its work while on item 7; "
    "the item goes to another worker, attempt 2 of 3`",
    exit=0,
)
@each_backend
def test_leaving_by_exit_is_a_death(program: Program, backend: str) -> None:
    ended = program.run(with_fault('if first("fault"): os._exit(0)'), "-b", backend)

    assert_row("A9", ended)
    assert_all_done(ended)


@fault(
    "A10",
    "`sys.exit()` in a job",
    items="dead; the worker lives",
    sees="`item 7 failed in stage work: SystemExit`",
    exit=1,
)
@pytest.mark.parametrize("raised", ["sys.exit()", "sys.exit(0)", "raise SystemExit('text')"])
def test_sys_exit_is_the_job_s_failure(program: Program, raised: str) -> None:
    ended = program.run(with_fault(f'note("pid", os.getpid()); {raised}'))

    assert_row("A10", ended)
    assert_all_done(ended, but={7})
    assert "replaced" not in ended.err


@fault(
    "A11",
    "a job raises KeyboardInterrupt, GeneratorExit, or a BaseException of its own",
    items="dead; the worker lives",
    sees="`item 7 failed in stage work: …: deliberate`",
    exit=1,
)
@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "GeneratorExit", "BaseException", "Own"])
def test_whatever_a_job_raises_is_its_own_failure(program: Program, kind: str) -> None:
    ended = program.run(
        "class Own(BaseException): ...\n" + with_fault(f"raise {kind}('deliberate')"), "-w", "1"
    )

    assert_row("A11", ended)
    assert_all_done(ended, but={7})
    assert says(f"{kind}: deliberate", ended.err)
    assert "replaced" not in ended.err


@fault(
    "A12",
    "SIGINT, SIGHUP or SIGTERM from outside to one worker",
    items="SIGINT, SIGHUP: done, a worker ignores them; SIGTERM: again",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGTERM while on item 7; "
    "the item goes to another worker, attempt 2 of 3`",
    exit=0,
)
@each_start_method
def test_a_worker_ignores_what_a_terminal_sends_and_dies_of_sigterm(program: Program, method: str) -> None:
    ended = program.run(
        with_fault(
            """
            for number in (signal.SIGINT, signal.SIGHUP):
                os.kill(os.getpid(), number)
            note("lives", i)
            if first("fault"):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1000)
            """
        ),
        "--start-method",
        method,
    )

    assert_row("A12", ended)
    assert_all_done(ended)
    assert ended.noted("lives") == ["7", "7"]


# --- who stands still -----------------------------------------------------------------------------


@fault(
    "A13",
    "suspended: SIGSTOP, Ctrl-Z, a debugger, a laptop that sleeps",
    items="done when it goes on, with those that it has finished and not told, or was given while it stood "
    "idle; all others are done meanwhile",
    sees="nothing: silence is no death",
    exit=0,
)
@each_backend
def test_a_suspended_worker_holds_up_its_own_job_only(program: Program, backend: str) -> None:
    ended = program.run(
        """
        @pipeline.producer
        def numbers() -> Iterator[int]:
            yield from range(20)
            until(lambda: len(noted("did")) == 19)
            note("did", "all others")
            os.kill(int(noted("stopped")[0]), signal.SIGCONT)
        """.replace("\n        ", "\n")
        + WORK.replace("FAULT", 'note("stopped", os.getpid()); os.kill(os.getpid(), signal.SIGSTOP)')
        + KEEP,
        "-b",
        backend,
    )

    assert_row("A13", ended)
    assert ended.noted("did")[-2:] == ["all others", "7"]
    assert sorted(ended.noted("kept")) == sorted(ended.noted("began")) == sorted(map(str, range(20)))
    assert "killed" not in ended.err


@proves("A13")
@each_backend
def test_a_worker_that_is_suspended_while_idle_is_not_judged_dead(program: Program, backend: str) -> None:
    source = IDLE.replace("signal.SIGKILL", "signal.SIGSTOP").replace(
        "    yield from range(2, 20)\n",
        "    yield from range(2, 20)\n"
        '    until(lambda: len(noted("kept")) > 2)\n'  # the other goes on
        "    os.kill(int(noted('pid')[0]), signal.SIGCONT)\n",
    )

    ended = program.run(source, "-b", backend)

    assert_row("A13", ended)
    assert_all_done(ended)
    assert len(ended.noted("did")) == 20
    assert "killed" not in ended.err


# --- who lives on, who looks away -----------------------------------------------------------------

GRANDCHILD = """
if first("fault"):
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    note("child", pid)
    die()
"""


@fault(
    "A14",
    "it is killed, and a process that its job forked lives on with the channel's descriptors",
    items="again",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL while on item 7; "
    "the item goes to another worker, attempt 2 of 3`",
    exit=0,
)
@each_start
def test_a_death_is_seen_though_a_grandchild_lives(program: Program, options: tuple[str, str]) -> None:
    ended = program.run(with_fault(GRANDCHILD), *options)

    (child,) = map(int, ended.noted("child"))
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # it ends with the run, but who knows when
    # multiprocessing's own processes, which it held up, may follow
    assert_row("A14", replace(ended, left=program.left()))
    assert_all_done(ended)


IGNORED = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
REAPED = """
import multiprocessing, threading

def reap():
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.001)

if multiprocessing.parent_process() is None:
    threading.Thread(target=reap, daemon=True).start()
"""


@fault(
    "A15",
    "the program ignores SIGCHLD, or calls `os.wait()` for children that are not its own",
    items="again",
    sees="`while on item 7; the item goes to another worker, attempt 2 of 3`; "
    "how it ended may not be known, since somebody else took its exit status",
    exit=0,
)
@each_start_method
@pytest.mark.parametrize("program_does", [IGNORED, REAPED], ids=["ignores", "reaps"])
def test_a_death_is_seen_though_its_status_is_taken(program: Program, program_does: str, method: str) -> None:
    ended = program.run(program_does + with_fault('if first("fault"): die()'), "--start-method", method)

    assert_row("A15", ended)
    assert_all_done(ended)


# --- many deaths ----------------------------------------------------------------------------------


@fault(
    "A16",
    "all workers of a stage are killed at once, while its queue is full",
    items="again",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL while on item 0; "
    "the item goes to another worker, attempt 2 of 3`, for each",
    exit=0,
)
@each_backend
def test_a_producer_does_not_wait_for_ever_on_a_full_queue(program: Program, backend: str) -> None:
    ended = program.run(
        NUMBERS
        + WORK.replace("workers=2", "workers=2, queue_size=1")
        .replace("if i == 7", "if i < 2")
        .replace(
            "FAULT",
            """note("met", i)
        until(lambda: len(set(noted("met"))) == 2)
        if first(f"fault {i}"):
            die()""",
        )
        + KEEP,
        "-b",
        backend,
    )

    assert_row("A16", ended)
    assert_all_done(ended)
    assert ended.err.count("was killed by SIGKILL") == 2


@fault(
    "A17",
    "a poison job kills every worker that touches it",
    items="dead after `max_deliveries` workers (3); others are done",
    sees="`item 7 of stage work killed its worker 3 times and is given up: 7`",
    exit=1,
)
@each_backend
def test_a_poison_job_is_given_up(program: Program, backend: str) -> None:
    ended = program.run(with_fault("die()"), "-b", backend)

    assert_row("A17", ended)
    assert_all_done(ended, but={7})
    assert ended.noted("began").count("7") == 3
    assert re.findall(r"attempt \d of \d", ended.err) == ["attempt 2 of 3", "attempt 3 of 3"]


UP = """
@pipeline.resource
def database() -> int:
    note("opened", os.getpid())
    OPENING
    return 1

@pipeline.consumer
def work(i: int, database: int) -> object:
    note("did", i)
    return i
"""


@fault(
    "A18",
    "every worker of a stage is killed before it finishes a job: import, resource, memory",
    items="cancelled",
    sees="what the workers wrote themselves, and `stage work: 5 workers in a row ended before they finished "
    "a job; the last one was killed by SIGKILL; giving up, 20 jobs unfinished`",
    exit=3,
)
def test_workers_that_are_killed_again_and_again_before_they_can_work_end_the_run(program: Program) -> None:
    opening = 'print("cannot reach the database", file=sys.stderr, flush=True); die()'

    ended = program.run(NUMBERS + UP.replace("OPENING", opening) + KEEP)

    assert_row("A18", ended)
    assert len(ended.noted("opened")) == ended.err.count("cannot reach the database") == 5
    assert ended.noted("did") == []


@proves("A18")
@pytest.mark.parametrize("method", ["forkserver", "spawn"])  # with fork nothing is loaded anew
def test_a_first_worker_that_ends_while_the_file_is_loaded_ends_the_run_at_once(
    program: Program, method: str
) -> None:
    source = "import multiprocessing\nif multiprocessing.parent_process(): os._exit(7)\n"

    ended = program.run(source + with_fault("pass"), "--start-method", method)

    assert ended.code == 3
    assert says("the first worker ended before it was ready: exited with code 7", ended.err)
    assert says("giving up, 0 jobs unfinished", ended.err)
    assert ended.left == ()


@proves("A18")
def test_a_job_that_is_done_between_deaths_resets_their_count(program: Program) -> None:
    ended = program.run(
        """
        @pipeline.producer
        def numbers() -> Iterator[int]:
            for i in range(20):
                yield i
                until(lambda: str(i) in noted("kept"))
                if i % 2:
                    os.kill(int(noted("pid")[-1]), signal.SIGKILL)

        @pipeline.consumer
        def work(i: int) -> object:
            note("did", i)
            note("pid", os.getpid())
            return i
        """.replace("\n        ", "\n")
        + KEEP
    )

    assert ended.code == 0, ended.err
    assert_all_done(ended)
    assert ended.err.count("was killed by SIGKILL") == 10


@fault(
    "A19",
    "a job never returns",
    items="with `timeout=`: dead, or again if retries are left; without: it is waited for",
    sees="`item 7 failed in stage work: TimeLimitExceeded: …`",
    exit=1,
)
@each_backend
def test_a_job_that_never_returns_is_stopped_at_its_time_limit(program: Program, backend: str) -> None:
    never = "import ctypes; signal.signal(signal.SIGTERM, signal.SIG_IGN); ctypes.PyDLL(None).sleep(1000)"

    ended = program.run(with_fault(never).replace("workers=2", "workers=2, timeout=0.5"), "-b", backend)

    assert_row("A19", ended)
    assert_all_done(ended, but={7})
    assert ended.noted("began").count("7") == 1


# --- more of them ---------------------------------------------------------------------------------


@fault(
    "A21",
    "SIGKILL while it holds a `jobq.Lock`",
    items="again; the lock is free at once",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL while on item 7; "
    "the item goes to another worker, attempt 2 of 3`",
    exit=0,
)
@each_backend
def test_a_lock_does_not_die_locked(program: Program, backend: str) -> None:
    ended = program.run(
        with_fault(
            """
            with Lock("one at a time"):
                if first("fault"):
                    until(lambda: not 19 > len(noted("did")) >= len(noted("waits")))  # one waits
                    die()
            """
        ).replace(
            '    note("did", i)\n',
            '    if i != 7: note("waits", i)\n    with Lock("one at a time"):\n        note("did", i)\n',
        ),
        "-b",
        backend,
    )

    assert_row("A21", ended)
    assert_all_done(ended)


@fault(
    "A22",
    "SIGKILL while it opens a resource",
    items="done: no job was in hand",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL…`",
    exit=0,
)
@each_start_method
def test_a_worker_that_is_killed_while_it_opens_a_resource_is_replaced(program: Program, method: str) -> None:
    ended = program.run(
        NUMBERS + UP.replace("OPENING", 'if first("fault"): die()') + KEEP, "--start-method", method
    )

    assert_row("A22", ended)
    assert_all_done(ended)
    assert len(ended.noted("opened")) == 2


@fault(
    "A23",
    "SIGKILL while it closes a resource, after its last job",
    items="done",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL`",
    exit=0,
)
@each_backend
def test_a_worker_that_is_killed_at_its_end_costs_nothing(program: Program, backend: str) -> None:
    ended = program.run(
        NUMBERS
        + UP.replace("database() -> int", "database() -> Iterator[int]").replace(
            "    OPENING\n    return 1", "    yield 1\n    die()"
        )
        + KEEP,
        "-b",
        backend,
    )

    assert_row("A23", ended)
    assert_all_done(ended)
    assert len(ended.noted("did")) == 20
    assert len(ended.noted("opened")) == 1


@fault(
    "A24",
    "the process that forked the workers (our nursery, multiprocessing's fork server) is killed, "
    "and then a worker",
    items="again; the other workers live on",
    sees="`worker 1 of stage work (pid 4711) ended, how is not known while on item 7; "
    "the item goes to another worker, attempt 2 of 3`: who could have told is gone",
    exit=0,
)
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_run_outlives_the_process_that_forks_its_workers(program: Program, method: str) -> None:
    ended = program.run(
        with_fault('if first("fault"):\n    os.kill(os.getppid(), signal.SIGKILL)\n    die()'),
        "--start-method",
        method,
    )

    assert_row("A24", ended)
    assert_all_done(ended)


@fault(
    "A25",
    "SIGKILL while several jobs are in hand (`concurrency`)",
    items="again, one at a time until it is known which one kills; those beside it are not charged for more",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL while on items 0, 1, 2`",
    exit=0,
)
@each_backend
def test_jobs_in_hand_beside_one_that_kills_are_done(program: Program, backend: str) -> None:
    ended = program.run(
        NUMBERS
        + WORK.replace("workers=2", "concurrency=3")
        .replace("if i == 7", "if i < 3")
        .replace(
            "FAULT",
            """note("met", i)
        until(lambda: len(set(noted("met"))) == 3)
        if first("fault"):
            die()
        elif noted("met").count(str(i)) == 1:
            time.sleep(1000)""",
        )
        + KEEP,
        "-b",
        backend,
    )

    assert_row("A25", ended)
    assert_all_done(ended)


@fault(
    "A26",
    "SIGKILL in the middle of a batch",
    items="again, all of the batch",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL while on item…`",
    exit=0,
)
@each_backend
def test_a_batch_whose_worker_is_killed_is_tried_again_whole(program: Program, backend: str) -> None:
    ended = program.run(
        NUMBERS
        + """
@pipeline.consumer(batch=5, workers=2)
def work(batch: list[int]) -> Iterator[object]:
    if 7 in batch and first("fault"):
        note("batch", *batch)
        die()
    for i in batch:
        note("did", i)
        yield i
"""
        + KEEP,
        "-b",
        backend,
    )

    assert_row("A26", ended)
    assert_all_done(ended)


@fault(
    "A27",
    "SIGKILL of a worker from which jobs were taken back, since the one in hand is slow",
    items="again, the one in hand; those taken back were done elsewhere, once",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL while on item 7; "
    "the item goes to another worker, attempt 2 of 3`",
    exit=0,
)
@each_backend
def test_what_was_taken_back_from_a_worker_that_is_killed_then_is_done_once(
    program: Program, backend: str
) -> None:
    ended = program.run(
        with_fault('if first("fault"): until(lambda: len(set(noted("did"))) == 19); die()'), "-b", backend
    )

    assert_row("A27", ended)
    assert_all_done(ended)


ORDERED = """
@pipeline.consumer(workers=3, ordered=True, queue_size=5)
def work(i: int, job: Job) -> object:
    if i % 5 == 2 and first(f"fault {i}"):
        die()
    note("did", i)
    return i
"""


@fault(
    "A28",
    "workers of an ordered stage are killed",
    items="again; the order is kept",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL while on item 2; "
    "the item goes to another worker, attempt 2 of 3`",
    exit=0,
)
@each_backend
def test_an_ordered_stage_keeps_its_order_over_deaths(program: Program, backend: str) -> None:
    ended = program.run(NUMBERS + ORDERED + KEEP, "-b", backend)

    assert_row("A28", ended)
    assert_all_done(ended)
    assert ended.noted("kept") == [str(i) for i in range(20)]


@fault(
    "A29",
    "SIGKILL while it closes its resources because it is being replaced by rule (`max_tasks_per_worker`)",
    items="done",
    sees="`worker 1 of stage work (pid 4711) was killed by SIGKILL`",
    exit=0,
)
@each_backend
def test_a_worker_that_is_killed_while_it_retires_costs_nothing(program: Program, backend: str) -> None:
    ended = program.run(
        NUMBERS
        + UP.replace("database() -> int", "database() -> Iterator[int]")
        .replace("    OPENING\n    return 1", '    yield 1\n    if first("fault"): die()')
        .replace("@pipeline.consumer", "@pipeline.consumer(max_tasks_per_worker=5)")
        + KEEP,
        "-b",
        backend,
    )

    assert_row("A29", ended)
    assert_all_done(ended)
    assert len(ended.noted("did")) == 20
    assert len(ended.noted("opened")) >= 4
