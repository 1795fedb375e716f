"""What the README and CONTRIBUTING show is run as it is shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
JOBQ = str(Path(sys.executable).with_name("jobq"))


def write_programs(page: str, folder: Path) -> None:
    """Write each block of *page* that begins with its file's name into that file."""
    text = (ROOT / page).read_text()
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        (folder / name).write_text(code)


def run(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the README's programs, and two files to count."""
    write_programs("README.md", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.md").write_text("three small words")
    (tmp_path / "docs" / "two.md").write_text("and more")
    return tmp_path


def test_the_pipeline_of_the_readme_has_fifteen_lines_at_most_and_runs_as_shown(folder: Path) -> None:
    lines = [line for line in (folder / "words.py").read_text().splitlines() if line]

    ended = run(JOBQ, "run", "words.py", "-p", "folder=docs", "-o", "-", cwd=folder)

    assert len(lines) <= 15
    assert ended.returncode == 0, ended.stderr
    results = sorted(map(json.loads, ended.stdout.splitlines()), key=str)
    assert results == [{"one.md": 3}, {"two.md": 2}]


@pytest.mark.parametrize("command", ["check", "graph"])
def test_the_pipeline_of_the_readme_passes_the_other_commands(command: str, folder: Path) -> None:
    ended = run(JOBQ, command, "words.py", cwd=folder)

    assert ended.returncode == 0, ended.stderr


def test_the_test_of_the_readme_passes(folder: Path) -> None:
    ended = run(sys.executable, "-m", "pytest", "-q", "test_words.py", cwd=folder)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 passed" in ended.stdout


def test_the_session_of_the_readme_runs_as_shown(folder: Path) -> None:
    ended = run(sys.executable, "feed.py", cwd=folder)

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("\n") == ["{'one.md': 3}", "1", "2", "3", ""]


def test_the_script_of_the_readme_runs_as_shown(folder: Path) -> None:
    ended = run(sys.executable, "nightly.py", cwd=folder)

    assert (ended.returncode, ended.stdout) == (0, "2 files, 5 words\n"), ended.stderr


def test_the_script_of_the_readme_tells_which_file_failed(folder: Path) -> None:
    (folder / "docs" / "bad.md").write_bytes(b"\xff")

    ended = run(sys.executable, "nightly.py", cwd=folder)

    assert ended.returncode == 1
    assert ended.stderr.startswith("1 files not counted: 'utf-8' codec can't decode")


def test_the_readme_shows_the_two_commands_that_ci_runs() -> None:
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)

    assert [command.rpartition("&& .venv/bin/")[2] for command in commands] == [
        "jobq run examples/stdlib_index.py",
        "python -m pytest -n 2 --dist worksteal",
    ]


def test_the_backend_of_contributing_keeps_the_contract(tmp_path: Path) -> None:
    write_programs("CONTRIBUTING.md", tmp_path)

    ended = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", ".", cwd=tmp_path)

    assert ended.returncode == 0, ended.stdout
