"""The classic programs of multiprocessing, run as a user runs them and judged by what they print."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.test_examples import EXAMPLES, JOBQ, session_members

pytestmark = pytest.mark.slow

PROCESSES = ["joinable", "sentinel", "pipe"]
PARALLEL = [*PROCESSES, "thread"]
ALL = [*PARALLEL, "inline"]

SECONDS = 30.0
SQUARES = "0 1 4 9 16 25 36 49 64 81"

on = pytest.mark.parametrize


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run *command* in a session of its own, and prove that a second later nothing of the session is left."""
    argv = list(map(str, command))
    with subprocess.Popen(
        argv,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        # multiprocessing's own fork server ends by itself when its program is gone.
        deadline = time.monotonic() + 1
        while (left := alive(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.01)
        if left:
            os.killpg(process.pid, signal.SIGKILL)
    assert left == [], "processes outlived the run"
    return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)


def alive(session: int) -> list[str]:
    """Return the processes of *session*, those that are only to be reaped by init excepted."""
    return [stat for stat in session_members(session) if not stat.rpartition(")")[2].startswith(" Z 1 ")]


def script(name: str, *arguments: object, cwd: Path) -> list[str]:
    """Return the lines that ``python NAME ...`` prints; it ends well, and nothing of it is left."""
    return lines(run(sys.executable, EXAMPLES / name, *arguments, cwd=cwd))


def command(name: str, *arguments: object, cwd: Path) -> list[str]:
    """Return the lines that ``jobq run NAME ...`` prints; it ends well, and nothing of it is left."""
    return lines(run(JOBQ, "run", EXAMPLES / name, *arguments, cwd=cwd))


def lines(ended: subprocess.CompletedProcess[str]) -> list[str]:
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def pids(line: str) -> set[int]:
    """Return the process ids of a line like ``pids: 12 13``."""
    label, _, numbers = line.partition(" ")
    assert label == "pids:"
    return set(map(int, numbers.split()))


# ── 1, 2: queues ─────────────────────────────────────────────────────────────


@on("backend", ALL)
def test_no_more_than_ten_wait_and_the_numbers_add_up_at_every_look(backend: str, tmp_path: Path) -> None:
    printed = script("queue_capacity.py", backend, cwd=tmp_path)

    assert printed == [
        "bun 0 eaten",
        "never more than 11 buns: ten that wait, one in hand",
        "51 cooked, 51 eaten, 0 waiting",
    ]


@on("backend", ALL)
def test_the_child_answers_what_the_parent_asked(backend: str, tmp_path: Path) -> None:
    assert script("two_way.py", backend, cwd=tmp_path) == [
        "child got 222",
        "parent got 'hello from the child, twice 222 is 444'",
    ]


# ── 3, 4, 5: producers and consumers ─────────────────────────────────────────


BUNS = sorted(f"ate {filling} bun {number}" for filling in ("bean", "leek") for number in range(10))


@on("backend", ALL)
def test_each_bun_is_eaten_once(backend: str, tmp_path: Path) -> None:
    *buns, last = script("sentinel_buns.py", backend, cwd=tmp_path)

    assert (sorted(buns), last) == (BUNS, "20 buns eaten")


@on("eaters", [1, 2, 5])
def test_each_bun_is_eaten_once_by_however_many_and_nobody_counts_them(eaters: int, tmp_path: Path) -> None:
    printed = command("sentinel_buns.py", "-b", "sentinel", "-w", eaters, "-o", "-", cwd=tmp_path)

    assert sorted(map(json.loads, printed)) == BUNS


@on("backend", ALL)
def test_cooks_end_before_eaters_and_eaters_before_main(backend: str, tmp_path: Path) -> None:
    program = (sys.executable, EXAMPLES / "joinable_noodles.py", backend)

    ended = run("/bin/sh", "-c", 'exec "$0" "$@" 2>&1', *program, cwd=tmp_path)

    assert ended.returncode == 0, ended.stdout
    told = ended.stdout
    dishes = re.findall(r"eat: ate (\w+ \d) with chopsticks", told)
    assert sorted(dishes) == [f"{dish} {number}" for dish in ("noodles", "soup") for number in range(10)]
    assert told.count("place cleared") in {1, 2}  # dishes come fast: one may have eaten them all
    assert told.count("of stage eat") == 4
    first_end_of_an_eater = re.search(r"worker \d of stage eat.* ended", told)
    end = re.search(r"ended after [\d.]+ s", told)
    assert first_end_of_an_eater
    assert end
    order = [
        max(told.index(f"producer {cook} ended after 10 items") for cook in ("sam", "kim")),
        first_end_of_an_eater.start(),
        end.start(),
        told.index("main: 20 dishes eaten"),
    ]
    assert order == sorted(order)
    assert told.rindex("eat: ate") < first_end_of_an_eater.start()


@on("backend", ALL)
def test_the_words_come_in_order_until_the_end_of_file(backend: str, tmp_path: Path) -> None:
    assert command("pipe_eof.py", "-b", backend, cwd=tmp_path) == [
        "received hello",
        "received hi",
        "received 你好",
        "EOF after 3 words",
    ]


@on("backend", ALL)
def test_falsy_items_arrive_like_all_others(backend: str, tmp_path: Path) -> None:
    *printed, last = script("pipe_consumers.py", backend, cwd=tmp_path)

    sent = [*range(10), 0.0, "", b"", False, [], {}]
    assert sorted(printed) == sorted(f"received {item!r}" for item in sent)
    assert last == "16 of 16 arrived"


# ── 6: shared state and events ───────────────────────────────────────────────


@on("backend", ALL)
def test_a_count_of_100_ends_at_0(backend: str, tmp_path: Path) -> None:
    assert command("shared_count.py", "-b", backend, cwd=tmp_path) == ["0 left"]


@on("backend", PROCESSES)
def test_a_count_of_100_ends_at_0_though_two_holders_of_the_lock_are_killed(
    backend: str, tmp_path: Path
) -> None:
    ended = run(JOBQ, "run", EXAMPLES / "shared_count.py", "-b", backend, "-p", "kill=true", cwd=tmp_path)

    assert lines(ended) == ["0 left"]
    assert ended.stderr.count("killed by SIGKILL while on item") == 2


@on("backend", ALL)
def test_at_most_three_are_in_the_section(backend: str, tmp_path: Path) -> None:
    most = 1 if backend == "inline" else 3

    assert command("semaphore.py", "-b", backend, cwd=tmp_path) == [f"at most {most} were inside, 0 are"]


@on("backend", PROCESSES)
def test_three_may_be_in_the_section_after_three_were_killed_in_it(backend: str, tmp_path: Path) -> None:
    ended = run(JOBQ, "run", EXAMPLES / "semaphore.py", "-b", backend, "-p", "kill=true", cwd=tmp_path)

    assert lines(ended) == ["at most 3 were inside, 0 are"]
    assert ended.stderr.count("killed by SIGKILL while on item") == 3


@on("backend", PARALLEL)
def test_nobody_drives_at_red_and_the_patrol_ends_in_good_order(backend: str, tmp_path: Path) -> None:
    assert script("event.py", backend, cwd=tmp_path) == [
        "red: 0 cars have passed",
        "green: car 0 drives, car 1 drives, car 2 drives",
        "High Street: patrol ended in good order",
    ]


# ── 7: pools ─────────────────────────────────────────────────────────────────


@on("backend", ALL)
def test_calls_go_to_three_workers_that_are_closed_in_the_end(backend: str, tmp_path: Path) -> None:
    squares, used, *closed, end = script("pool_apply.py", backend, cwd=tmp_path)

    assert squares == f"squares: {SQUARES}"
    assert len(pids(used)) <= (3 if backend in PROCESSES else 1)
    counts = re.findall(
        r"closed after (\d+) jobs", "".join(closed)
    )  # threads may print into a line of others
    assert 1 <= len(counts) <= 3
    assert sum(map(int, counts)) == 10
    assert end == "pool_apply is closed"


@on("backend", ALL)
def test_futures_give_results_and_errors_in_the_order_of_the_calls(backend: str, tmp_path: Path) -> None:
    ready, *answers, used, dead = script("pool_async.py", backend, cwd=tmp_path)

    assert ready == "ready: True"
    assert answers == [
        "1 / 0: ZeroDivisionError('division by zero')" if number == 0 else f"1 / {number}: {1 / number:.2f}"
        for number in range(-2, 7)
    ]
    assert len(pids(used)) <= (3 if backend in PROCESSES else 1)
    assert dead == "dead letters: 1"


@on("backend", ALL)
def test_map_takes_what_it_needs_of_an_endless_input(backend: str, tmp_path: Path) -> None:
    mapped, used, *others = script("pool_map.py", backend, cwd=tmp_path)

    assert mapped == f"map: {SQUARES}"
    assert len(pids(used)) <= (3 if backend in PROCESSES else 1)
    assert others == ["sum: 285", "run.map: 0 1 4 9 16", "run.map: 25 36 49 64 81"]


# ── 10: beyond the classics ──────────────────────────────────────────────────


@on("backend", ALL)
def test_the_crawler_fetches_each_page_once_and_ends_by_itself(backend: str, tmp_path: Path) -> None:
    *pages, last = script("crawler_loop.py", backend, cwd=tmp_path)

    sizes = {"": 26, "a": 42, "b": 25, "c": 26, "d": 0}
    assert sorted(re.sub(r"^http://localhost:\d+", "", page) for page in pages) == [
        f"/{path} has {size} characters" for path, size in sizes.items()
    ]
    assert last == "5 links led to known pages"


@on("backend", ALL)
def test_invoices_are_paid_and_receipts_filed(backend: str, tmp_path: Path) -> None:
    printed = script("branch_by_type.py", backend, cwd=tmp_path)

    assert sorted(printed) == ["filed 25", "filed 60", "paid 100", "paid 250", "paid 7"]


@on(
    ("backend", "rows"),
    [*((backend, 1050) for backend in ALL), *(("joinable", rows) for rows in (0, 1, 100))],
)
def test_every_row_is_inserted_by_the_hundred_and_the_rest_at_the_end(
    backend: str, rows: int, tmp_path: Path
) -> None:
    printed = command("batch_insert.py", "-b", backend, "-p", f"rows={rows}", cwd=tmp_path)

    rest = [f"inserted {rows % 100}"] if rows % 100 else []
    assert printed == ["inserted 100"] * (rows // 100) + rest
    with closing(sqlite3.connect(tmp_path / "numbers.db")) as database:
        if rows:
            found = database.execute("SELECT number, square FROM square ORDER BY number").fetchall()
            assert found == [(number, number * number) for number in range(rows)]


@on("backend", ALL)
def test_the_script_counts_every_file(backend: str, tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text("three small words")
    (tmp_path / "two.md").write_text("and more")

    assert script("embed_in_script.py", ".", backend, cwd=tmp_path) == ["2 files, 5 words, 0 s"]


@on("backend", ALL)
def test_the_script_names_the_file_that_it_could_not_count(backend: str, tmp_path: Path) -> None:
    (tmp_path / "good.md").write_text("fine")
    (tmp_path / "bad.md").write_bytes(b"\xff")

    ended = run(sys.executable, EXAMPLES / "embed_in_script.py", ".", backend, cwd=tmp_path)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"bad\.md: UnicodeDecodeError: 'utf-8' codec can't decode .*\n", ended.stderr)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.md", "good.md"]


# ── all of them ──────────────────────────────────────────────────────────────

CLASSICS = [
    "queue_capacity",
    "two_way",
    "sentinel_buns",
    "joinable_noodles",
    "pipe_eof",
    "pipe_consumers",
    "shared_count",
    "semaphore",
    "event",
    "pool_apply",
    "pool_async",
    "pool_map",
    "crawler_loop",
    "rate_limited_api",
    "branch_by_type",
    "batch_insert",
    "embed_in_script",
]


@on("name", CLASSICS)
def test_a_classic_has_sixty_lines_at_most_and_is_in_the_table(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60
    assert f"| [`{name}.py`]({name}.py) | " in (EXAMPLES / "README.md").read_text()
