"""jobq inside other programs: real ones, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import START_METHODS, Ended, ended, survivors

pytestmark = pytest.mark.slow

#: What every program here begins with. Each worker is killed once, so that one is started in mid-run too.
HEAD = """
import json, os, signal, sys, threading, time
from collections.abc import Iterator
from pathlib import Path
import jobq
from jobq import Job, Pipeline

pipeline = Pipeline("embedded")

@pipeline.producer
def numbers(count: int = 6) -> Iterator[int]:
    yield from range(count)

@pipeline.consumer(workers=2)
def double(i: int, job: Job) -> int:
    if i == 3 and job.delivery == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with Path("notes").open("a") as file:
        file.write(f"{i}\\n")
    return 2 * i
"""

DOUBLED = [0, 2, 4, 6, 8, 10]


def program(folder: Path, text: str, *arguments: str) -> Ended:
    """Run a program file to its end."""
    (folder / "program.py").write_text(HEAD + text)
    return ended((sys.executable, "program.py", *arguments), folder)


def told(ended: Ended) -> Any:
    """Return what the program said on its last line, when each item was done."""
    assert ended.code == 0, ended.stderr
    assert {int(line) for line in ended.notes} == set(range(6))
    return json.loads(ended.stdout.splitlines()[-1])


# ── threads ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("start_method", ["auto", *START_METHODS])
def test_a_program_with_busy_threads_has_its_work_done(start_method: str, tmp_path: Path) -> None:
    text = f"""
def spin(over: threading.Event) -> None:
    lock = threading.Lock()
    while not over.is_set():
        with lock:
            sum(range(1000))

if __name__ == "__main__":
    over = threading.Event()
    threads = [threading.Thread(target=spin, args=(over,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        report = pipeline.run(start_method={start_method!r}, collect=True)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    print(json.dumps(sorted(report.results)))
"""
    assert told(program(tmp_path, text)) == DOUBLED


@pytest.mark.parametrize("start_method", ["auto", *START_METHODS])
@pytest.mark.parametrize(
    "call",
    [
        "sorted(pipeline.run(START, collect=True).results)",
        "sorted(pipeline.stream(START))",
        "submitted()",
    ],
    ids=["run", "stream", "open"],
)
def test_a_thread_that_is_not_the_main_one_runs_a_pipeline(
    call: str, start_method: str, tmp_path: Path
) -> None:
    text = f"""
def submitted() -> list[int]:
    with pipeline.open(START) as run:
        return [future.result() for future in [run.submit(i) for i in range(6)]]

def work() -> None:
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    results.extend({call})
    assert [signal.getsignal(number) for number in signal.valid_signals()] == before

if __name__ == "__main__":
    results: list[int] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    print(json.dumps(results))
""".replace("START", f"start_method={start_method!r}")

    assert told(program(tmp_path, text)) == DOUBLED


def test_two_threads_run_a_pipeline_each(tmp_path: Path) -> None:
    text = """
def work(place: int) -> None:
    results[place] = sorted(pipeline.run(collect=True).results)

if __name__ == "__main__":
    results = [[], []]
    threads = [threading.Thread(target=work, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(results))
"""
    assert told(program(tmp_path, text)) == [DOUBLED, DOUBLED]


# ── signal handlers ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("start_method", START_METHODS)
def test_the_handlers_of_the_program_are_kept_and_put_back(start_method: str, tmp_path: Path) -> None:
    text = f"""
def mine(number: int, frame: object) -> None:
    seen.append(number)

if __name__ == "__main__":
    seen: list[int] = []
    ours = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD, signal.SIGALRM)
    for number in ours:
        signal.signal(number, mine)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    report = pipeline.run(start_method={start_method!r}, collect=True)

    assert all(signal.getsignal(number) is mine for number in ours)
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_DFL
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert signal.set_wakeup_fd(-1) == write
    for number in ours:
        os.kill(os.getpid(), number)
    assert set(seen) == set(ours)
    print(json.dumps(sorted(report.results)))
"""
    assert told(program(tmp_path, text)) == DOUBLED


def test_a_handler_of_the_program_is_called_during_the_run(tmp_path: Path) -> None:
    text = """
@pipeline.consumer
def signals(i: int) -> int:
    if i == 10:
        os.kill(int(os.environ["PROGRAM"]), signal.SIGUSR1)
        while not Path("handled").exists():
            time.sleep(0.01)
    return i

if __name__ == "__main__":
    os.environ["PROGRAM"] = str(os.getpid())
    signal.signal(signal.SIGUSR1, lambda *_: Path("handled").touch())
    print(json.dumps(sorted(pipeline.run(collect=True).results)))
"""
    assert told(program(tmp_path, text)) == DOUBLED


# ── asyncio ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("start_method", ["auto", *START_METHODS])
def test_an_asyncio_program_runs_a_pipeline_in_a_thread_and_goes_on(
    start_method: str, tmp_path: Path
) -> None:
    text = f"""
import asyncio

async def main() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticking = asyncio.create_task(tick())
    report = await asyncio.to_thread(pipeline.run, start_method={start_method!r}, collect=True)
    ticking.cancel()
    assert ticks > 1
    print(json.dumps(sorted(report.results)))

if __name__ == "__main__":
    asyncio.run(main())
"""
    assert told(program(tmp_path, text)) == DOUBLED


def test_an_asyncio_program_awaits_what_it_submits(tmp_path: Path) -> None:
    text = """
import asyncio

async def main() -> None:
    with pipeline.open() as run:
        futures = [asyncio.wrap_future(run.submit(i)) for i in range(6)]
        print(json.dumps(await asyncio.gather(*futures)))

if __name__ == "__main__":
    asyncio.run(main(), debug=True)
"""
    assert told(program(tmp_path, text)) == DOUBLED


def test_a_coroutine_may_block_its_loop_with_a_run_and_the_loops_handlers_come_back(tmp_path: Path) -> None:
    text = """
import asyncio

async def main() -> None:
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    report = pipeline.run(collect=True)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(asked.wait(), 20)
    print(json.dumps(sorted(report.results)))

if __name__ == "__main__":
    asyncio.run(main())
"""
    assert told(program(tmp_path, text)) == DOUBLED


# ── a __main__ that is no file ───────────────────────────────────────────────

TYPED_IN = HEAD + "\nprint(json.dumps(sorted(pipeline.run(START, collect=True).results)))\n"

#: What a notebook's kernel does: cells are compiled under invented file names, in a `__main__` of its own.
KERNEL = """
import linecache, sys, types
main = types.ModuleType("__main__")
main.__dict__.update(__builtins__=__builtins__, get_ipython=lambda: None)
sys.modules["__main__"] = main
for number, cell in enumerate({cells!r}):
    name = f"/nowhere/ipykernel_1/{{number}}.py"
    linecache.cache[name] = len(cell), None, cell.splitlines(True), name
    exec(compile(cell, name, "exec"), main.__dict__)
"""

THREAD = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""

CONSOLE = """
import code, sys
console = code.InteractiveConsole(sys.modules["__main__"].__dict__)
for cell in {cells!r}:
    assert not console.runsource(cell, "<console>", "exec")
"""


def typed_in(how: str, folder: Path, start_method: str) -> subprocess.CompletedProcess[str]:
    """Run the program as *how* says, without a file of it."""
    cells = TYPED_IN.replace("START", f"start_method={start_method!r}").split("\n\n")
    arguments, stdin = {
        "command": (["-c", "\n\n".join(cells)], ""),
        "stdin": (["-"], "\n\n".join(cells)),
        "console": (["-c", CONSOLE.format(cells=cells)], ""),
        "kernel": (["-c", KERNEL.format(cells=cells)], ""),
        "kernel with threads": (["-c", THREAD + KERNEL.format(cells=cells)], ""),
    }[how]
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=50)
        finally:
            process.kill()
        assert survivors(process.pid) == []
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


HOWS = ["command", "stdin", "console", "kernel"]


@pytest.mark.parametrize("start_method", ["auto", "fork"])
@pytest.mark.parametrize("how", HOWS)
def test_functions_that_were_typed_in_are_run_with_fork(how: str, start_method: str, tmp_path: Path) -> None:
    done = typed_in(how, tmp_path, start_method)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == DOUBLED


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
@pytest.mark.parametrize("how", HOWS)
def test_functions_that_were_typed_in_are_refused_before_a_process_starts_that_could_not_find_them(
    how: str, start_method: str, tmp_path: Path
) -> None:
    done = typed_in(how, tmp_path, start_method)

    assert done.stdout == ""
    for name in ("numbers()", "double()"):
        assert name in done.stderr
    assert "can't be found by name in a worker" in done.stderr
    assert "the main program is not a file" in done.stderr
    assert "use start_method='fork'" in done.stderr
    assert not (tmp_path / "notes").exists()


@pytest.mark.parametrize("start_method", ["auto", "forkserver", "spawn"])
def test_a_notebook_whose_kernel_has_threads_is_told_of_fork(start_method: str, tmp_path: Path) -> None:
    done = typed_in("kernel with threads", tmp_path, start_method)

    assert done.stdout == ""
    assert "use start_method='fork'" in done.stderr


def test_a_notebook_whose_kernel_has_threads_may_ask_for_fork(tmp_path: Path) -> None:
    done = typed_in("kernel with threads", tmp_path, "fork")

    assert json.loads(done.stdout.splitlines()[-1]) == DOUBLED, done.stderr


# ── pytest ───────────────────────────────────────────────────────────────────

TESTED = """
import os, signal
from collections.abc import Iterator

import pytest
from jobq import Job, Pipeline

pipeline = Pipeline("tested")

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(20)

@pipeline.consumer(workers=2)
def double(i: int, job: Job) -> int:
    if i == 3 and job.delivery == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * i

@pytest.mark.parametrize("start_method", ["auto", "fork", "forkserver", "spawn"])
def test_run(start_method):
    report = pipeline.run(start_method=start_method, collect=True)

    assert sorted(report.results) == list(range(0, 40, 2))

@pytest.mark.parametrize("backend", ["joinable", "sentinel", "pipe"])
def test_stream(backend):
    assert sorted(pipeline.stream(backend=backend)) == list(range(0, 40, 2))
"""


def test_pipelines_run_under_pytest_xdist(tmp_path: Path) -> None:
    (tmp_path / "test_tested.py").write_text(TESTED)

    done = ended(
        (sys.executable, "-m", "pytest", "-q", "-n", "2", "-W", "error", "-p", "no:cacheprovider"), tmp_path
    )

    assert done.code == 0, done.stdout
    assert "7 passed" in done.stdout
