"""Chapter D: jobs that change the process they run in."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.commands import PROCESSES, START_METHODS, WAYS, Ended, jobq_run, write
from tests.faults.rows import fault, out_of_reach, proves

pytestmark = pytest.mark.slow

SIX = ["0", "1", "2", "3", "4", "5"]


def run_job(folder: Path, body: str, *arguments: str, head: str = "", options: str = "") -> Ended:
    """
    Run six items through a job that does *body* with item 2, then notes the item and gives it on.

    *body* may ask ``job.delivery``.
    """
    indented = "".join(f"        {line}\n" for line in body.strip().splitlines())
    text = (
        f"{head}\n@pipeline.consumer({options})\ndef work(i: int, job: Job) -> int:\n"
        f"    if i == 2:\n{indented}    note(i)\n    return i\n"
    )
    return jobq_run(write(folder, text), *arguments)


def letters(ended: Ended) -> list[dict[str, object]]:
    (file,) = ended.folder.glob("*.dead.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def all_is_done(ended: Ended) -> None:
    """Assert that each item gave its result once, and that a job noted it."""
    assert (ended.code, ended.results) == (0, SIX), ended.stderr
    assert set(ended.notes) >= set(SIX)


# ── descriptors and copies ───────────────────────────────────────────────────


@fault(
    "D1",
    "a job closes all descriptors and opens files, which get the channel's numbers",
    items="again; not a byte of them is written into the job's files",
    sees="a warning: a job closed descriptors that are not its own",
    exit=0,
)
@pytest.mark.parametrize(("backend", "start_method"), WAYS)
def test_a_job_that_closes_all_descriptors_never_has_its_own_files_written(
    backend: str, start_method: str, tmp_path: Path
) -> None:
    body = """
if job.delivery == 1:
    os.closerange(3, 1000)
    files = [os.open(FOLDER / "precious", os.O_RDWR | os.O_CREAT) for _ in range(60)]
"""
    ended = run_job(tmp_path, body, "-b", backend, "--start-method", start_method)

    all_is_done(ended)
    assert (tmp_path / "precious").read_bytes() == b""
    assert "while on item 2; the item goes to another worker, attempt 2 of 3" in ended.stderr
    assert "a job closed descriptors that are not its own" in ended.stderr


@fault(
    "D2",
    "a job forks and comes back in both processes",
    items="done; the copy does none of the items that follow, and leaves",
    sees="nothing",
    exit=0,
)
@pytest.mark.parametrize(("backend", "start_method"), WAYS)
def test_a_job_that_comes_back_twice_is_answered_once(
    backend: str, start_method: str, tmp_path: Path
) -> None:
    text = """
@pipeline.consumer
def work(i: int) -> int:
    if i == 300:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
    note(i)
    return i
"""
    ended = jobq_run(write(tmp_path, text), "-p", "count=600", "-b", backend, "--start-method", start_method)

    assert ended.code == 0, ended.stderr
    assert sorted(map(int, ended.results)) == list(range(600))
    assert Counter(ended.notes) == Counter([*map(str, range(600)), "300"])


# ── children ─────────────────────────────────────────────────────────────────

CHILDREN = """
import multiprocessing

def double(i: int) -> int:
    note(f"child of {i}")
    return 2 * i

def sleep() -> None:
    note(f"sleeper {os.getpid()}")
    time.sleep(1000)
"""


@fault(
    "D3",
    "a job starts multiprocessing processes",
    items="dead, done where the stage has daemon=False",
    sees="daemonic processes are not allowed to have children; say daemon=False",
    exit=1,
)
def test_a_job_that_starts_processes_is_told_of_the_option_for_it(tmp_path: Path) -> None:
    ended = run_job(tmp_path, "multiprocessing.Process(target=double, args=(i,)).start()", head=CHILDREN)

    assert (ended.code, ended.results) == (1, ["0", "1", "3", "4", "5"])
    assert "daemonic processes are not allowed to have children" in ended.stderr
    assert "daemon=False" in ended.stderr
    assert [letter["item"] for letter in letters(ended)] == [2]


@proves("D3")
@pytest.mark.parametrize("start_method", START_METHODS)
def test_without_daemon_a_job_has_processes_of_its_own(start_method: str, tmp_path: Path) -> None:
    body = """
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(double, [1, 2, 3]) == [2, 4, 6]
"""
    ended = run_job(tmp_path, body, "--start-method", start_method, head=CHILDREN, options="daemon=False")

    all_is_done(ended)
    assert {"child of 1", "child of 2", "child of 3"} <= set(ended.notes)


@proves("D3")
@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize("daemon", [True, False])
def test_the_processes_of_a_worker_that_was_killed_end_with_the_run(
    start_method: str, daemon: bool, tmp_path: Path
) -> None:
    body = f"""
if job.delivery == 1:
    multiprocessing.get_context("fork").Process(target=sleep, daemon={daemon}).start()
    while not (FOLDER / "notes").exists() or "sleeper" not in (FOLDER / "notes").read_text():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = run_job(tmp_path, body, "--start-method", start_method, head=CHILDREN, options="daemon=False")

    all_is_done(ended)


@proves("D3")
def test_a_process_that_never_ends_does_not_keep_its_worker_from_ending(tmp_path: Path) -> None:
    body = "multiprocessing.Process(target=sleep).start()"

    ended = run_job(
        tmp_path,
        body,
        "--start-method",
        "fork",
        "--shutdown-timeout",
        "2",
        head=CHILDREN,
        options="daemon=False",
    )

    all_is_done(ended)


# ── the state of the process ─────────────────────────────────────────────────


@fault(
    "D4",
    "a job changes folder, umask, environment, locale and signal handlers, and closes standard streams",
    items="done, those that follow too",
    sees="nothing; files of the run are where they belong",
    exit=0,
)
@pytest.mark.parametrize(("backend", "start_method"), WAYS)
def test_a_job_that_changes_the_state_of_its_process_harms_no_other(
    backend: str, start_method: str, tmp_path: Path
) -> None:
    body = """
os.chdir("/")
os.umask(0o777)
os.environ.clear()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE):
    signal.signal(number, signal.SIG_IGN)
import locale
locale.setlocale(locale.LC_ALL, "C")
for stream in (sys.stdin, sys.stdout, sys.stderr):
    stream.close()
os.closerange(0, 3)
"""
    ended = run_job(tmp_path, body, "-b", backend, "--start-method", start_method)

    all_is_done(ended)
    assert len(ended.notes) == 6


@proves("D4")
def test_a_job_that_has_made_itself_deaf_is_stopped_by_its_time_limit(tmp_path: Path) -> None:
    body = """
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
while True:
    time.sleep(1000)
"""
    ended = run_job(tmp_path, body, options="timeout=0.5")

    assert (ended.code, ended.results) == (1, ["0", "1", "3", "4", "5"])
    assert "took longer than 0.5 s" in ended.stderr


@fault(
    "D5",
    "a job recurses without end after setrecursionlimit",
    items="again, then dead after max_deliveries; the others done",
    sees="was killed by SIGSEGV while on item 2; item 2 killed its worker 2 times and is given up",
    exit=1,
)
def test_a_stack_that_overflows_costs_its_item_alone(tmp_path: Path) -> None:
    head = """
import threading

def deeper(i):
    return list(map(deeper, [i]))
"""
    body = """
sys.setrecursionlimit(10**9)
threading.stack_size(64 * 1024)  # else it takes a while
thread = threading.Thread(target=deeper, args=(i,))
thread.start()
thread.join()
"""
    ended = run_job(tmp_path, body, head=head, options="max_deliveries=2")

    assert (ended.code, ended.results) == (1, ["0", "1", "3", "4", "5"])
    assert "was killed by SIGSEGV while on item 2; the item goes to another worker" in ended.stderr
    (letter,) = letters(ended)
    assert (letter["item"], letter["error"], letter["deliveries"]) == (2, "WorkerLost", 2)


@fault(
    "D6",
    "a job asks for more memory than the process may have (RLIMIT_AS)",
    items="dead; the others done, by the same worker or its replacement",
    sees="item 2 failed in stage work: MemoryError",
    exit=1,
)
@pytest.mark.parametrize("backend", PROCESSES)
def test_a_lack_of_memory_is_the_jobs_failure(backend: str, tmp_path: Path) -> None:
    body = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
bytearray(2**33)
"""
    ended = run_job(tmp_path, body, "-b", backend)

    assert (ended.code, ended.results) == (1, ["0", "1", "3", "4", "5"])
    assert "item 2 failed in stage work: MemoryError" in ended.stderr
    assert [letter["item"] for letter in letters(ended)] == [2]


out_of_reach(
    "D7",
    "workers print without end, and their lines interleave",
    items="done",
    sees="lines of several workers in one, where one write is longer than PIPE_BUF (4,096 bytes)",
    why="what jobs print goes where it always went, untouched: an option that collects and marks it is not "
    "built, and the job's own `job.log` writes whole lines with stage and worker",
)


# ── faults that the first list lacked ────────────────────────────────────────


@fault(
    "D8",
    "a job sets an alarm, whose handler raises in whatever runs when it rings",
    items="dead if it rings in the job; again if it rings between jobs and so ends the worker",
    sees="item 2 failed in stage work: RuntimeError: the alarm",
    exit=1,
)
def test_an_alarm_that_rings_in_the_job_is_its_failure(tmp_path: Path) -> None:
    body = """
def ring(*_):
    raise RuntimeError("the alarm")
signal.signal(signal.SIGALRM, ring)
signal.setitimer(signal.ITIMER_REAL, 0.05)
time.sleep(1000)
"""
    ended = run_job(tmp_path, body)

    assert (ended.code, ended.results) == (1, ["0", "1", "3", "4", "5"])
    assert "item 2 failed in stage work: RuntimeError: the alarm" in ended.stderr


@proves("D8")
@pytest.mark.parametrize("backend", PROCESSES)
def test_an_alarm_that_rings_between_jobs_ends_the_worker_and_loses_nothing(
    backend: str, tmp_path: Path
) -> None:
    # The producer waits until the worker has ended: it is idle when the alarm rings.
    head = """
pipeline = Pipeline("p")

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from (0, 1, 2)
    while not (FOLDER / "ringing").is_symlink():
        time.sleep(0.01)
    while Path("/proc", (FOLDER / "ringing").readlink()).exists():
        time.sleep(0.01)
    yield from (3, 4, 5)

def ring(*_):
    raise RuntimeError("the alarm")
"""
    text = f"""{head}
@pipeline.consumer
def work(i: int) -> int:
    note(i)
    if i == 2 and not (FOLDER / "ringing").is_symlink():
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        (FOLDER / "ringing").symlink_to(str(os.getpid()))
    return i
"""
    ended = jobq_run(write(tmp_path, text), "-b", backend)

    all_is_done(ended)
    assert "RuntimeError: the alarm" in ended.stderr


@fault(
    "D9",
    "a job leaves its session or process group (setsid)",
    items="done",
    sees="nothing; the worker ends with the run all the same",
    exit=0,
)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_worker_that_has_left_the_session_ends_with_the_run(start_method: str, tmp_path: Path) -> None:
    body = """
os.setsid()
note(f"worker {os.getpid()}")
"""
    ended = run_job(tmp_path, body, "--start-method", start_method)

    all_is_done(ended)
    (pid,) = (int(line.split()[1]) for line in ended.notes if line.startswith("worker"))
    assert not Path(f"/proc/{pid}").exists()


@proves("D9")
def test_a_worker_that_has_left_the_session_is_stopped_with_a_killed_run(tmp_path: Path) -> None:
    body = """
os.setsid()
note(f"worker {os.getpid()}")
os.kill(int(os.environ["DRIVER"]), signal.SIGKILL)
time.sleep(1000)
"""
    head = 'os.environ["DRIVER"] = str(os.getpid())\n'
    ended = run_job(tmp_path, body, "--start-method", "fork", head=head)

    assert ended.code == -signal.SIGKILL
    (pid,) = (int(line.split()[1]) for line in ended.notes if line.startswith("worker"))
    _until_gone(pid)


@fault(
    "D10",
    "a job uses up the descriptors of its worker",
    items="dead; so are those that follow in this worker and need a descriptor",
    sees="item 2 failed in stage work: OSError: [Errno 24] Too many open files",
    exit=1,
)
@pytest.mark.parametrize("backend", PROCESSES)
def test_a_worker_without_free_descriptors_still_answers(backend: str, tmp_path: Path) -> None:
    body = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
files = []
def greedy():
    while True:
        files.append(os.open("/dev/null", os.O_RDONLY))
greedy()
"""
    ended = run_job(tmp_path, body, "-b", backend)

    assert (ended.code, ended.results) == (1, ["0", "1"])  # each job opens the file of its notes
    assert "item 2 failed in stage work: OSError: [Errno 24] Too many open files" in ended.stderr
    assert len(letters(ended)) == 4


@fault(
    "D11",
    "a job leaves a process that holds the worker's descriptors",
    items="done",
    sees="nothing: the run ends, and what a job forked ends with it",
    exit=0,
)
@pytest.mark.parametrize(("backend", "start_method"), WAYS)
def test_a_process_that_a_job_left_behind_does_not_hold_up_the_run(
    backend: str, start_method: str, tmp_path: Path
) -> None:
    body = """
if os.fork() == 0:
    while True:
        signal.pause()
"""
    ended = run_job(tmp_path, body, "-b", backend, "--start-method", start_method)

    all_is_done(ended)


@fault(
    "D12",
    "a job leaves a thread that never ends",
    items="done",
    sees="nothing",
    exit=0,
)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_thread_that_a_job_left_behind_does_not_hold_up_the_run(start_method: str, tmp_path: Path) -> None:
    body = """
import threading
threading.Thread(target=threading.Event().wait).start()
"""
    all_is_done(run_job(tmp_path, body, "--start-method", start_method))


@fault(
    "D13",
    "a job replaces functions of the standard library (time, pickle, os.write, json, print)",
    items="done",
    sees="nothing",
    exit=0,
)
@pytest.mark.parametrize("backend", PROCESSES)
def test_functions_that_a_job_replaces_for_itself_are_not_ours(backend: str, tmp_path: Path) -> None:
    body = """
import builtins, json, pickle
def refuse(*_, **__):
    raise AssertionError("this is replaced")
note(i)
time.time = time.sleep = json.dumps = json.loads = builtins.print = refuse
pickle.Pickler = pickle.Unpickler = refuse
return i
"""
    all_is_done(run_job(tmp_path, body, "-b", backend))


@fault(
    "D14",
    "a job sets multiprocessing's start method",
    items="done",
    sees="nothing",
    exit=0,
)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_the_start_method_that_a_job_sets_is_its_own(start_method: str, tmp_path: Path) -> None:
    body = """
import multiprocessing
multiprocessing.set_start_method("spawn", force=True)
if job.delivery == 1:
    os.kill(os.getpid(), signal.SIGKILL)  # so that another is started
"""
    all_is_done(run_job(tmp_path, body, "--start-method", start_method))


@fault(
    "D15",
    "a job turns the collector off, its switch interval up, and raises in a destructor",
    items="done",
    sees="what Python itself writes of the destructor",
    exit=0,
)
def test_settings_of_the_interpreter_that_a_job_changes_harm_nobody(tmp_path: Path) -> None:
    body = """
import gc
gc.disable()
sys.setswitchinterval(100)
sys.setrecursionlimit(200)
class Bad:
    def __del__(self):
        raise SystemExit("from a destructor")
Bad()
"""
    ended = run_job(tmp_path, body)

    all_is_done(ended)
    assert "from a destructor" in ended.stderr


def _until_gone(pid: int) -> None:
    """Return when no process has this number; a second is what a worker may outlive its run."""
    end = os.pidfd_open(pid) if Path(f"/proc/{pid}").exists() else -1
    if end >= 0:
        import select

        poll = select.poll()
        poll.register(end, select.POLLIN)
        assert poll.poll(2000), "the worker outlived its run"
        os.close(end)
