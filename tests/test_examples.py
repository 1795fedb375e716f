"""The examples, run as a user runs them: in a process of their own, judged by what they leave behind."""

from __future__ import annotations

import ast
import os
import sqlite3
import subprocess
import sys
import sysconfig
import warnings
from collections import Counter
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
STDLIB = Path(sysconfig.get_path("stdlib"))
JOBQ = str(Path(sys.executable).with_name("jobq"))


def run(*command: object, cwd: Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run *command* in a session of its own, and prove that nothing of the session is left."""
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
            stdout, stderr = process.communicate(timeout=seconds)
        finally:
            process.kill()
        left = session_members(process.pid)
    assert left == [], "processes outlived the run"
    return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)


def index(cwd: Path, **params: object) -> subprocess.CompletedProcess[str]:
    """Run the example as the README does, in *cwd*."""
    given = (f"-p{name}={value}" for name, value in params.items())
    return run(JOBQ, "run", EXAMPLES / "stdlib_index.py", *given, cwd=cwd)


def session_members(session: int) -> list[str]:
    """Return the processes of *session*, the one that leads it excepted."""
    members = []
    for stat in (process / "stat" for process in Path("/proc").glob("[0-9]*")):
        try:
            text = stat.read_text()
        except OSError:  # it ended while we looked
            continue
        pid, _, rest = text.partition(" ")
        state, parent, _, its_session = rest.rpartition(")")[2].split()[:4]
        ended = state == "Z" and parent == "1"  # only the system has not heard of it yet
        if int(its_session) == session != int(pid) and not ended:
            members.append(text)
    return members


def printed_totals(stdout: str) -> dict[str, int]:
    return {kind: int(count) for count, kind in map(str.split, stdout.splitlines())}


def serial_totals(root: Path) -> dict[str, int]:
    """Count what the index should hold, one file after the other and without jobq."""
    totals: Counter[str] = Counter()
    for file in root.glob("**/*.py"):
        if {"site-packages", "dist-packages"} & set(file.relative_to(root).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError):
                continue
        totals["module"] += 1
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                totals["class"] += 1
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                totals["function"] += 1
    return dict(totals)


def test_the_index_of_a_package_has_the_totals_of_a_serial_count(tmp_path: Path) -> None:
    root = STDLIB / "asyncio"

    ended = index(tmp_path, root=root, database="it.db")

    assert ended.returncode == 0, ended.stderr
    assert printed_totals(ended.stdout) == serial_totals(root)
    assert [file.name for file in tmp_path.iterdir()] == ["it.db"]


def test_the_index_holds_each_definition_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "source" / "zoo.py"
    file.parent.mkdir()
    file.write_text("class Cat:\n    def purr(self): ...\n\nasync def feed(): ...\n")

    ended = index(tmp_path, root=file.parent, database="it.db")

    assert ended.returncode == 0, ended.stderr
    assert rows(tmp_path / "it.db") == [
        (str(file), 1, "class", "Cat"),
        (str(file), 1, "module", "zoo"),
        (str(file), 2, "function", "purr"),
        (str(file), 4, "function", "feed"),
    ]


def rows(database: Path) -> list[tuple[str, int, str, str]]:
    connection = sqlite3.connect(database)
    try:
        return sorted(connection.execute("SELECT path, line, kind, name FROM definition"))
    finally:
        connection.close()


def test_a_file_that_is_no_python_is_filtered_and_the_rest_is_indexed(tmp_path: Path) -> None:
    root = tmp_path / "source"
    (root / "site-packages").mkdir(parents=True)
    (root / "site-packages" / "installed.py").write_text("def not_ours(): ...\n")
    (root / "good.py").write_text("def found(): ...\n")
    (root / "empty.py").touch()
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\ndef caf\xe9(): ...\n")
    (root / "old.py").write_text("print 'two'\n")
    (root / "undecodable.py").write_bytes(b"name = '\xf6'\n")
    (root / "nul.py").write_bytes(b"x = 1\0\n")
    (root / os.fsdecode(b"odd\xff.py")).touch()
    (root / "folder.py").mkdir()
    (root / "gone.py").symlink_to(root / "nowhere.py")

    ended = index(tmp_path, root=root)

    assert ended.returncode == 0, ended.stderr
    assert printed_totals(ended.stdout) == {"module": 4, "function": 2}
    assert {name for *_, name in rows(tmp_path / "stdlib_index.db")} == {
        "good",
        "empty",
        "latin",
        "found",
        "odd\\udcff",
        "café",
    }


def test_a_second_run_replaces_the_index_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "first.py").touch()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "second.py").touch()

    for root in "one", "two":
        ended = index(tmp_path, root=root)
        assert ended.returncode == 0, ended.stderr

    assert [name for *_, name in rows(tmp_path / "stdlib_index.db")] == ["second"]


def test_a_limit_bounds_how_many_files_are_indexed(tmp_path: Path) -> None:
    ended = index(tmp_path, root=STDLIB / "json", limit=2)

    assert ended.returncode == 0, ended.stderr
    assert printed_totals(ended.stdout)["module"] == 2


def test_a_root_that_does_not_exist_is_named_and_ends_with_code_1(tmp_path: Path) -> None:
    ended = index(tmp_path, root="nowhere")

    assert ended.returncode == 1
    assert "nowhere is no folder" in ended.stderr


@pytest.mark.slow
@pytest.mark.matrix
def test_the_index_of_the_whole_standard_library_has_the_totals_of_a_serial_count(tmp_path: Path) -> None:
    ended = run(sys.executable, EXAMPLES / "stdlib_index.py", cwd=tmp_path, seconds=120)

    assert ended.returncode == 0, ended.stderr
    assert printed_totals(ended.stdout) == serial_totals(STDLIB)
    assert printed_totals(ended.stdout)["module"] > 1000
