"""Chapter E: what the machine refuses, and how processes start."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.commands import JOBQ, PROCESSES, START_METHODS, WAYS, Ended, ended, jobq_run, write
from tests.faults.rows import fault, proves

pytestmark = pytest.mark.slow

SIX = ["0", "1", "2", "3", "4", "5"]

WORK = """
@pipeline.consumer(workers=2)
def work(i: int) -> int:
    note(i)
    return i
"""

#: Each worker is killed with its first item, so that another has to be started.
MORTAL = """
@pipeline.consumer(workers=2)
def work(i: int, job: Job) -> int:
    if i in (0, 3) and job.delivery == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    note(i)
    return i
"""

#: How a pipeline file finds its driver, which alone loads the file under fork.
DRIVER = 'os.environ.setdefault("DRIVER", str(os.getpid()))\n'


def all_is_done(ended: Ended) -> None:
    """Assert that each item gave its result once, and that a job noted it."""
    assert (ended.code, ended.results) == (0, SIX), ended.stderr
    assert set(ended.notes) >= set(SIX)


def limited(which: int, limit: int) -> Callable[[], None]:
    """Return what lowers a limit of the process that calls it."""
    return partial(resource.setrlimit, which, (limit, limit))


def in_namespace(set_up: str, path: Path, *arguments: str, flags: str = "-Urm") -> Ended:
    """Run a pipeline file with mounts of its own, after the shell commands *set_up*."""
    probe = subprocess.run(["unshare", flags, "true"], check=False, capture_output=True)
    if probe.returncode:
        pytest.skip("this system gives no user namespaces to play in")
    jobq = " ".join((*JOBQ, "run", path.name, "-o results --log-format console", *arguments))
    return ended(("unshare", flags, "sh", "-c", f"{set_up}\nexec {jobq}"), path.parent)


# ── the machine's limits ─────────────────────────────────────────────────────


@fault(
    "E1",
    "/dev/shm is full",
    items="none is taken",
    sees="this backend's queues need POSIX semaphores; /dev/shm, and how many bytes of it are free",
    exit=2,
)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_full_dev_shm_is_named_before_anything_runs(start_method: str, tmp_path: Path) -> None:
    path = write(tmp_path, WORK)
    full = "mount -t tmpfs -o size=4k none /dev/shm; head -c 4096 /dev/zero > /dev/shm/full"

    ended = in_namespace(full, path, "--start-method", start_method)

    assert (ended.code, ended.notes) == (2, [])
    assert "need POSIX semaphores: [Errno 28] No space left on device" in ended.stderr
    assert "/dev/shm, where 0 of 4,096 bytes are free" in ended.stderr


@proves("E1")
def test_large_items_need_no_dev_shm(tmp_path: Path) -> None:
    text = """
@pipeline.consumer
def grow(i: int) -> bytes:
    return bytes(10_000_000)

@pipeline.consumer
def work(data: bytes) -> int:
    note(len(data))
    return len(data)
"""
    full = "mount -t tmpfs -o size=4k none /dev/shm; head -c 4096 /dev/zero > /dev/shm/full"

    ended = in_namespace(full, write(tmp_path, text), "-b", "pipe")

    assert (ended.code, ended.results) == (0, ["10000000"] * 6), ended.stderr


@fault(
    "E2",
    "the system has no semaphores (sem_open: Function not implemented)",
    items="done, by the backend pipe; none is taken where the backend was named",
    sees="started: numbers → work (backend pipe instead of joinable, which needs semaphores)",
    exit=0,
)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_without_semaphores_the_default_backend_is_pipe(start_method: str, tmp_path: Path) -> None:
    ended = jobq_run(write(tmp_path, NO_SEMAPHORES + WORK), "--start-method", start_method)

    all_is_done(ended)
    assert "(backend pipe instead of joinable, which needs semaphores" in ended.stderr


@proves("E2")
@pytest.mark.parametrize("backend", ["joinable", "sentinel"])
def test_without_semaphores_a_backend_that_was_asked_for_is_refused(backend: str, tmp_path: Path) -> None:
    ended = jobq_run(write(tmp_path, NO_SEMAPHORES + WORK), "-b", backend)

    assert (ended.code, ended.notes) == (2, [])
    assert "need POSIX semaphores" in ended.stderr
    assert "The backend 'pipe' needs none" in ended.stderr


NO_SEMAPHORES = """
import _multiprocessing, errno

class SemLock:
    SEM_VALUE_MAX = 2**31 - 1
    _rebuild = None

    def __new__(cls, *_):
        raise OSError(errno.ENOSYS, "Function not implemented")

_multiprocessing.SemLock = SemLock
"""


@fault(
    "E3",
    "too few descriptors (ulimit -n) for the workers",
    items="none is taken; mid-run: again, by the workers that are left, or by a later replacement",
    sees="3 workers need 34 descriptors, and so many are free: this process may have 32 (ulimit -n)",
    exit=2,
)
@pytest.mark.parametrize(("backend", "start_method"), WAYS)
def test_a_lack_of_descriptors_is_told_with_its_limit_before_anything_runs(
    backend: str, start_method: str, tmp_path: Path
) -> None:
    path = write(tmp_path, WORK)

    ended = jobq_run(
        path, "-b", backend, "--start-method", start_method, set_up=limited(resource.RLIMIT_NOFILE, 32)
    )

    assert (ended.code, ended.notes) == (2, [])
    assert "3 workers need 34 descriptors" in ended.stderr
    assert "this process may have 32 (ulimit -n)" in ended.stderr


@proves("E3")
@pytest.mark.parametrize("backend", PROCESSES)
def test_a_worker_that_cant_be_replaced_now_is_replaced_later(backend: str, tmp_path: Path) -> None:
    # The first job takes the driver's descriptors away and dies; the second, in the worker that is left,
    # gives them back when the death was seen.
    text = f"""{DRIVER}
import resource

@pipeline.consumer(workers=2, queue_size=1)
def work(i: int, job: Job) -> int:
    driver = int(os.environ["DRIVER"])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if i == 0 and job.delivery == 1:
        while "1 is in hand" not in noted():
            time.sleep(0.01)
        resource.prlimit(driver, resource.RLIMIT_NOFILE, (3, most))
        note("the first dies")
        os.kill(os.getpid(), signal.SIGKILL)
    if i == 1 and job.delivery == 1:
        note("1 is in hand")
        while "the first dies" not in noted():
            time.sleep(0.01)
        time.sleep(0.7)  # for a try in vain, and another; were there none, nothing would change for the test
        resource.prlimit(driver, resource.RLIMIT_NOFILE, (most, most))
    note(i)
    return i

def noted() -> list[str]:
    return (FOLDER / "notes").read_text().splitlines() if (FOLDER / "notes").exists() else []
"""
    all_is_done(jobq_run(write(tmp_path, text), "-b", backend, "--start-method", "fork"))


@fault(
    "E4",
    "no more processes (ulimit -u), or a stage that can't have a worker for 10 s",
    items="none is taken; mid-run: unfinished ones are cancelled",
    sees="no worker can be started: Resource temporarily unavailable (ulimit -u); mid-run exit code 3: "
    "stage work has had no worker for 10 s",
    exit=2,
)
@pytest.mark.parametrize("processes", [1, 2], ids=["nobody can fork workers", "no worker can be forked"])
def test_a_lack_of_processes_is_told_with_its_limit(
    processes: int, tmp_path: Path, unprivileged: tuple[str, ...]
) -> None:
    path = write(tmp_path, WORK)

    ended_ = ended(
        (
            *unprivileged,
            "prlimit",
            f"--nproc={processes}",
            *JOBQ,
            "run",
            path.name,
            "-b",
            "pipe",
            "--start-method",
            "fork",
        ),
        tmp_path,
    )

    assert (ended_.code, ended_.notes) == (2, [])
    assert "Resource temporarily unavailable (ulimit -u)" in ended_.stderr


@proves("E4")
@pytest.mark.parametrize("backend", PROCESSES)
def test_a_stage_without_workers_that_can_have_none_ends_the_run(backend: str, tmp_path: Path) -> None:
    text = f"""{DRIVER}
import resource
import jobq.driver

jobq.driver.DESERTED_SECONDS = 0.8  # in place of 10

@pipeline.consumer
def work(i: int, job: Job) -> int:
    if i == 2:
        resource.prlimit(int(os.environ["DRIVER"]), resource.RLIMIT_NOFILE, (3, 3))
        os.kill(os.getpid(), signal.SIGKILL)
    note(i)
    return i
"""
    ended = jobq_run(write(tmp_path, text), "-b", backend, "--start-method", "fork")

    assert ended.code == 3
    assert (
        "stage work has had no worker for 0.8 s: no worker can be started: Too many open files"
        in ended.stderr
    )
    assert "jobs unfinished" in ended.stderr


@pytest.fixture
def unprivileged(tmp_path: Path) -> tuple[str, ...]:
    """Return how to run a command as a user whom limits bind: root is exempt from that of processes."""
    if os.geteuid():
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("root is exempt from the limit of processes, and setpriv is not there to become another")
    tmp_path.chmod(0o777)
    able = "+dac_override,+dac_read_search"
    unused = 30_000 + os.getpid() % 30_000  # the limit is one for all processes of a user
    user = f"--reuid={unused}", f"--regid={unused}", "--clear-groups"
    return ("setpriv", *user, f"--inh-caps={able}", f"--ambient-caps={able}")


@fault(
    "E5",
    "queue_size larger than a semaphore can count",
    items="done",
    sees="nothing; a queue_size that is negative, zero or a fraction is refused, exit code 2",
    exit=0,
)
@pytest.mark.parametrize("backend", PROCESSES)
def test_a_queue_may_be_of_any_size(backend: str, tmp_path: Path) -> None:
    text = WORK.replace("workers=2", "workers=2, queue_size=2**70, queue_bytes=2**80")

    all_is_done(jobq_run(write(tmp_path, text), "-b", backend))


@proves("E5")
@pytest.mark.parametrize("size", ["-5", "0", "1.5", "float('inf')"])
def test_a_size_that_is_none_is_refused(size: str, tmp_path: Path) -> None:
    ended = jobq_run(write(tmp_path, WORK.replace("workers=2", f"queue_size={size}")))

    assert (ended.code, ended.notes) == (2, [])
    assert "option queue_size=" in ended.stderr
    assert "work" in ended.stderr


@fault(
    "E6",
    "TMPDIR is longer than the address of a socket may be",
    items="done",
    sees="nothing",
    exit=0,
)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_long_tmpdir_is_no_trouble(start_method: str, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 50)
    folder.mkdir()

    ended = jobq_run(write(tmp_path, MORTAL), "--start-method", start_method, TMPDIR=str(folder))

    all_is_done(ended)
    assert list(folder.iterdir()) == []


# ── start methods ────────────────────────────────────────────────────────────


def script(folder: Path, text: str, *arguments: str) -> Ended:
    """Run a program that isn't `jobq run`."""
    path = write(folder, text, name="program.py")
    return ended((sys.executable, path.name, *arguments), folder)


@fault(
    "E7",
    "a thread of the embedding program holds a lock while workers are started",
    items="done",
    sees="nothing: where threads run, start_method='auto' doesn't fork",
    exit=0,
)
@pytest.mark.parametrize("backend", PROCESSES)
def test_a_lock_that_a_thread_holds_is_not_held_in_workers(backend: str, tmp_path: Path) -> None:
    text = f"""
import threading

lock = threading.Lock()

@pipeline.consumer
def work(i: int, job: Job) -> int:
    if i == 3 and job.delivery == 1:
        os.kill(os.getpid(), signal.SIGKILL)  # so that another is started
    with lock:
        note(i)
    return i

def hold(held: threading.Event, over: threading.Event) -> None:
    with lock:
        held.set()
        over.wait()

if __name__ == "__main__":
    held, over = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold, args=(held, over))
    thread.start()
    held.wait()
    try:
        report = pipeline.run(backend={backend!r}, collect=True)
        print(*sorted(report.results))
    finally:
        over.set()
        thread.join()
"""
    ended = script(tmp_path, text)

    assert (ended.code, ended.stdout) == (0, "0 1 2 3 4 5\n"), ended.stderr
    assert set(ended.notes) == set(SIX)


@fault(
    "E8",
    "a program without main guard",
    items="none is taken",
    sees="runs a pipeline while … is being loaded; put the call behind a main guard",
    exit=2,
)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_file_without_main_guard_is_told_so(start_method: str, tmp_path: Path) -> None:
    ended = jobq_run(write(tmp_path, WORK + "\npipeline.run()\n"), "--start-method", start_method)

    assert (ended.code, ended.notes) == (2, [])
    assert "pipeline_file.py is being loaded" in ended.stderr
    assert "main guard" in ended.stderr
    assert "Traceback" not in ended.stderr


@proves("E8")
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_program_without_main_guard_is_told_so_in_a_few_lines(start_method: str, tmp_path: Path) -> None:
    ended = script(tmp_path, f"{WORK}\npipeline.run(start_method={start_method!r})\n")

    children, traceback, parent = ended.stderr.partition("Traceback (most recent call last)")
    assert (ended.code, ended.notes) == (1, [])
    assert "runs a pipeline while a worker process imports it.\n" in children
    assert "main guard" in children
    assert traceback, ended.stderr
    assert "main guard" in parent
    assert "runpy" not in ended.stderr
    assert "freeze_support" not in ended.stderr


@fault(
    "E9",
    "a pipeline file whose name is no module's name, with items of classes of its own",
    items="done",
    sees="nothing",
    exit=0,
)
@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize("name", ["my pipe-line.py", "class.py"])
def test_a_file_of_any_name_is_loaded_under_one_name_everywhere(
    name: str, start_method: str, tmp_path: Path
) -> None:
    text = """
from dataclasses import dataclass

@dataclass
class Box:
    content: int

@pipeline.consumer
def pack(i: int) -> Box:
    return Box(i)

@pipeline.consumer
def work(box: Box) -> int:
    assert type(box) is Box
    note(box.content)
    return box.content
"""
    all_is_done(jobq_run(write(tmp_path, text, name=name), "--start-method", start_method))


@fault(
    "E10",
    "the pipeline file, or what it imports, raises",
    items="none is taken",
    sees="can't be loaded, and the traceback of the file; where it raises in workers only, exit code 3",
    exit=2,
)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_file_that_raises_is_told_with_its_traceback(start_method: str, tmp_path: Path) -> None:
    ended = jobq_run(write(tmp_path, WORK + "\nimport no_such_module\n"), "--start-method", start_method)

    assert (ended.code, ended.notes) == (2, [])
    assert "can't be loaded" in ended.stderr
    assert "ModuleNotFoundError: No module named 'no_such_module'" in ended.stderr
    assert "importlib" not in ended.stderr


@proves("E10")
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_file_that_raises_in_workers_only_ends_the_run(start_method: str, tmp_path: Path) -> None:
    text = f"{WORK}\nif 'SEEN' in os.environ:\n    raise OSError('no licence')\nos.environ['SEEN'] = '1'\n"

    ended = jobq_run(write(tmp_path, text), "--start-method", start_method)

    assert (ended.code, ended.notes) == (3, [])
    assert "the first worker ended before it was ready" in ended.stderr
    assert "OSError: no licence" in ended.stderr


@fault(
    "E11",
    "a spawned worker dies before it has read its arguments, which are large",
    items="none is taken",
    sees="the first worker ended before it was ready: exited with code 9 before it was ready",
    exit=3,
)
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_child_that_dies_before_it_reads_is_not_waited_for(start_method: str, tmp_path: Path) -> None:
    (tmp_path / "large").write_text("x" * 3_000_000)
    text = """
@pipeline.producer
def texts(text: str = "") -> Iterator[str]:
    yield text

@pipeline.consumer
def measure(text: str) -> int:
    return len(text)

if "SEEN" in os.environ:
    os._exit(9)
os.environ["SEEN"] = "1"
Pipeline.__init__(pipeline, "p")
pipeline.producer(texts, params={"text": (FOLDER / "large").read_text()})
pipeline.consumer(measure)
"""
    ended = jobq_run(write(tmp_path, text), "--start-method", start_method)

    assert (ended.code, ended.results) == (3, [])
    assert "the first worker ended before it was ready: exited with code 9" in ended.stderr


@fault(
    "E12",
    "the process that starts the workers (fork server, nursery) is killed in the middle of the run",
    items="done, or again",
    sees="nothing; with a fork server, a warning for each worker whose end it can't tell any more",
    exit=0,
)
@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
@pytest.mark.parametrize("backend", PROCESSES)
def test_the_run_goes_on_when_what_starts_the_workers_is_killed(
    backend: str, start_method: str, tmp_path: Path
) -> None:
    text = """
@pipeline.consumer(workers=2, max_deliveries=5)
def work(i: int, job: Job) -> int:
    if i == 2 and job.delivery == 1:
        note("killed the parent")
        os.kill(os.getppid(), signal.SIGKILL)
    if i == 4 and job.delivery == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    note(i)
    return i
"""
    ended = jobq_run(write(tmp_path, text), "-b", backend, "--start-method", start_method)

    all_is_done(ended)
    assert "killed the parent" in ended.notes


@fault(
    "E13",
    "workers that were forked draw the same random numbers",
    items="done",
    sees="nothing: each worker draws its own from `random` (numpy's old global generator is not reseeded)",
    exit=0,
)
@pytest.mark.parametrize(("backend", "start_method"), WAYS)
def test_workers_draw_different_random_numbers(backend: str, start_method: str, tmp_path: Path) -> None:
    text = """
import random
random.random()

@pipeline.consumer(workers=3)
def work(i: int) -> int:
    note(f"{os.getpid()} {random.random()}")
    while len({line.split()[0] for line in (FOLDER / "notes").read_text().splitlines()}) < 3:
        time.sleep(0.01)
    return i
"""
    ended = jobq_run(write(tmp_path, text), "-b", backend, "--start-method", start_method)

    drawn = [line.split()[1] for line in ended.notes]
    assert (ended.code, ended.results) == (0, SIX), ended.stderr
    assert len(set(drawn)) == len(drawn) == 6


# ── faults that the first list lacked ────────────────────────────────────────


@fault(
    "E14",
    "standard streams are closed when the run starts (`<&- >&- 2>&-`)",
    items="done; what jobs print goes nowhere, and never into a channel or file that got the number",
    sees="nothing can be said",
    exit=0,
)
@pytest.mark.parametrize(
    ("closed", "start_method"),
    [((0,), "fork"), ((1,), "fork"), ((2,), "fork"), *(((0, 1, 2), method) for method in START_METHODS)],
)
def test_closed_standard_streams_are_nobodys_numbers(
    closed: tuple[int, ...], start_method: str, tmp_path: Path
) -> None:
    text = """
@pipeline.consumer(workers=2)
def work(i: int, job: Job) -> int:
    for fd in (1, 2):
        try:
            os.write(fd, b"this goes where the streams went")
        except OSError:
            pass
    if i == 3 and job.delivery == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    print(i)
    print(i, file=sys.stderr)
    note(i)
    return i
"""
    path = write(tmp_path, text)

    def close() -> None:
        for fd in closed:
            os.close(fd)

    ended = jobq_run(path, "--start-method", start_method, set_up=close)

    all_is_done(ended)
    assert sorted(set(ended.notes)) == SIX
    assert not any(
        b"streams" in file.read_bytes() for file in tmp_path.iterdir() if file != path and file.is_file()
    )


@fault(
    "E15",
    "the environment is bare: no HOME, no PATH, C locale, a TMPDIR that isn't there",
    items="done",
    sees="nothing; non-ASCII text is escaped where the terminal can't show it",
    exit=0,
)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_bare_environment_is_enough(start_method: str, tmp_path: Path) -> None:
    bare = dict.fromkeys(os.environ)
    kept = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LC_ALL": "C", "TMPDIR": "/no/such/folder"}

    ended = jobq_run(
        write(tmp_path, MORTAL),
        "--start-method",
        start_method,
        **{**bare, **kept, "PYTHONCOERCECLOCALE": "0"},
    )

    all_is_done(ended)


@fault(
    "E16",
    "Python's own switches: -O (no asserts), -OO, -W error, dev mode, fixed hash seed, unbuffered",
    items="done",
    sees="nothing",
    exit=0,
)
@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize(
    "switches",
    [
        {"PYTHONOPTIMIZE": "2"},
        {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"},
        {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    ],
    ids=["OO", "dev", "others"],
)
def test_switches_of_the_interpreter_change_nothing(
    switches: dict[str, str], start_method: str, tmp_path: Path
) -> None:
    ended = jobq_run(write(tmp_path, MORTAL), "--start-method", start_method, **switches)

    all_is_done(ended)
    assert "Warning" not in ended.stderr


@fault(
    "E17",
    "the kernel gives pipes of one page (pipe-user-pages-soft is used up)",
    items="done",
    sees="nothing: frames of any size go through any pipe",
    exit=0,
)
@pytest.mark.parametrize(("backend", "start_method"), WAYS)
def test_pipes_of_one_page_are_enough(backend: str, start_method: str, tmp_path: Path) -> None:
    text = """
import jobq.backends.channel
jobq.backends.channel.PIPE_SIZE = 4096

@pipeline.consumer(workers=2)
def grow(i: int) -> list[int]:
    return [i] * 50_000

@pipeline.consumer(workers=2)
def work(long: list[int]) -> int:
    assert len(long) == 50_000
    note(long[0])
    return long[0]
"""
    all_is_done(jobq_run(write(tmp_path, text), "-b", backend, "--start-method", start_method))


@fault(
    "E18",
    "the run is process 1 of its namespace, as in a container",
    items="done; a worker that was killed is replaced",
    sees="nothing besides its warning",
    exit=0,
)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_the_run_may_be_process_1(start_method: str, tmp_path: Path) -> None:
    path = write(tmp_path, MORTAL)

    all_is_done(
        in_namespace(
            "",
            path,
            "--start-method",
            start_method,
            flags="-Urmpf",
        )
    )


@fault(
    "E19",
    "there is no /proc",
    items="done; a worker that was killed is replaced",
    sees="nothing besides its warning",
    exit=0,
)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_system_without_proc_is_enough(start_method: str, tmp_path: Path) -> None:
    path = write(tmp_path, MORTAL)

    all_is_done(in_namespace("mount -t tmpfs none /proc", path, "--start-method", start_method))


@fault(
    "E20",
    "the kernel has no pidfd (before 5.3, some sandboxes)",
    items="done; a worker that was killed is replaced",
    sees="nothing besides its warning",
    exit=0,
)
@pytest.mark.parametrize(("backend", "start_method"), WAYS)
def test_a_kernel_without_pidfd_is_enough(backend: str, start_method: str, tmp_path: Path) -> None:
    text = """
def refuse(*_):
    raise OSError(38, "Function not implemented")

os.pidfd_open = refuse
"""
    all_is_done(jobq_run(write(tmp_path, text + MORTAL), "-b", backend, "--start-method", start_method))


@fault(
    "E21",
    "whoever started the run had blocked or ignored all signals",
    items="done; a worker that was killed is replaced",
    sees="nothing besides its warning",
    exit=0,
)
@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize("how", ["blocked", "ignored"])
def test_signals_that_were_blocked_or_ignored_before_harm_nobody(
    how: str, start_method: str, tmp_path: Path
) -> None:
    def set_up() -> None:
        signals = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
        if how == "blocked":
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        else:
            for number in signals:
                signal.signal(number, signal.SIG_IGN)

    all_is_done(jobq_run(write(tmp_path, MORTAL), "--start-method", start_method, set_up=set_up))


@fault(
    "E22",
    "the folder of the dead letters can't be written",
    items="dead, named in the log and counted; the others done",
    sees="item 2 failed in stage work; the dead letters can't be written",
    exit=1,
)
def test_dead_letters_that_cant_be_written_are_told(tmp_path: Path) -> None:
    text = """
@pipeline.consumer
def work(i: int) -> int:
    if i == 2:
        raise ValueError("no")
    note(i)
    return i
"""
    path = write(tmp_path, text)

    ended = jobq_run(path, "--dead-letters", "/proc/letters")

    assert (ended.code, ended.results) == (1, ["0", "1", "3", "4", "5"]), ended.stderr
    assert "item 2 failed in stage work: ValueError: no" in ended.stderr


@fault(
    "E23",
    "the current folder is removed while the run goes on",
    items="done; a worker that was killed is replaced under fork (multiprocessing's own start-up, under "
    "forkserver and spawn, needs the folder)",
    sees="nothing besides its warning",
    exit=0,
)
@pytest.mark.parametrize("backend", PROCESSES)
def test_a_current_folder_that_is_gone_is_not_needed(backend: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    text = """
@pipeline.consumer(workers=2)
def work(i: int, job: Job) -> int:
    if i == 2 and job.delivery == 1:
        (FOLDER / "gone").rmdir()
        os.kill(os.getpid(), signal.SIGKILL)
    note(i)
    return i
"""
    path = write(tmp_path, text)
    results = tmp_path / "results"

    done = ended((*JOBQ, "run", str(path), "-b", backend, "--start-method", "fork", "-o", str(results)), gone)

    assert done.code == 0, done.stderr
    assert sorted(results.read_text().split()) == SIX
    assert not gone.exists()


@fault(
    "E24",
    "there is one core, by affinity or control group",
    items="done",
    sees="nothing",
    exit=0,
)
@pytest.mark.parametrize("backend", PROCESSES)
def test_one_core_is_enough(backend: str, tmp_path: Path) -> None:
    def one_core() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    all_is_done(jobq_run(write(tmp_path, MORTAL), "-b", backend, set_up=one_core))
