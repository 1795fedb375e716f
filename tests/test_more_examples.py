"""More of the examples: sockets, URLs, images and rows, run as a user runs them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_examples import EXAMPLES, JOBQ, session_members

pytestmark = pytest.mark.slow

SECONDS = 20.0
BACKENDS = ["thread", "joinable", "sentinel", "pipe"]


def survivors(session: int) -> list[str]:
    """
    Return the processes of *session* that still run a second after its leader has ended.

    `multiprocessing`'s own fork server and resource tracker end a moment later than whoever started them.
    """
    deadline = time.monotonic() + 1
    while left := [stat for stat in session_members(session) if stat.rpartition(")")[2].split()[0] != "Z"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return left


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
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
            stdout, stderr = process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert survivors(process.pid) == [], "processes outlived the run"
    return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)


class ChatServer:
    """A chat server in a session of its own."""

    def __init__(self, cwd: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [JOBQ, "run", EXAMPLES / "chat_server.py", *options],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert first.startswith("listening on port"), self.process.communicate(timeout=SECONDS)[1]
        self.port = int(first.split()[-1])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def end(self) -> str:
        """Return what it wrote to stderr until it ended, and prove that nothing of it is left."""
        _, errors = self.process.communicate(timeout=SECONDS)
        assert survivors(self.process.pid) == [], "processes outlived the server"
        return errors


@contextlib.contextmanager
def chat_server(cwd: Path, *options: str) -> Iterator[ChatServer]:
    """Run a chat server, at most as long as the test."""
    server = ChatServer(cwd, *options)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.communicate()


def say(client: socket.socket, word: str) -> tuple[int, str]:
    """Return who answered *word*, and what."""
    client.sendall(f"{word}\n".encode())
    return hear(client)


def hear(client: socket.socket) -> tuple[int, str]:
    line = b""
    while not line.endswith(b"\n"):
        more = client.recv(4096)
        assert more, "the server hung up"
        line += more
    worker, _, answer = line.decode().rstrip("\n").partition(" ")
    return int(worker), answer


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fifth_client_waits_until_one_of_four_leaves(tmp_path: Path, backend: str) -> None:
    with chat_server(tmp_path, "-b", backend, "-p", "clients=5") as server, contextlib.ExitStack() as open_:
        first = [open_.enter_context(server.connect()) for _ in range(4)]
        pids = {say(client, "hello")[0] for client in first}
        assert len(pids) == 4

        fifth = open_.enter_context(server.connect())
        fifth.sendall("hi, 你好\n".encode())
        assert [say(client, "still here")[1] for client in first] == ["STILL HERE"] * 4
        fifth.settimeout(0.3)
        with pytest.raises(TimeoutError):
            fifth.recv(1)
        fifth.settimeout(SECONDS)
        first[2].close()
        worker, answer = hear(fifth)

        assert answer == "HI, 你好"
        assert worker in pids
        open_.close()
        server.end()
        assert server.process.returncode == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_client_that_vanishes_harms_nobody(tmp_path: Path, backend: str) -> None:
    with chat_server(tmp_path, "-b", backend, "-p", "clients=6", "-w", "1") as server:
        for _ in range(5):
            vanishing = server.connect()
            say(vanishing, "hello")
            # Closing resets the connection instead of ending it, as a crash would.
            vanishing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            vanishing.close()
        with server.connect() as last:
            assert say(last, "anybody there?")[1] == "ANYBODY THERE?"

        server.end()
        assert server.process.returncode == 0
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_closes_the_chat_cleanly(tmp_path: Path, backend: str) -> None:
    with chat_server(tmp_path, "-b", backend) as server, server.connect() as client:
        say(client, "hello")

        os.killpg(server.process.pid, signal.SIGINT)

        assert client.recv(1) == b"", "the server closes the conversation"
        errors = server.end()
        # Interrupted; or complete, if the producer saw the stop itself and ended.
        assert server.process.returncode in (128 + signal.SIGINT, 0), errors
        assert "Traceback" not in errors
        assert list(tmp_path.iterdir()) == [], "nothing was cancelled, so there are no dead letters"


def test_clients_talk_to_the_server_all_at_once(tmp_path: Path) -> None:
    with chat_server(tmp_path, "-b", "thread", "-p", "clients=6") as server:
        ended = run(
            *(JOBQ, "run", EXAMPLES / "chat_client.py", "-p", f"port={server.port}", "-o", "-"), cwd=tmp_path
        )

        assert ended.returncode == 0, ended.stderr
        heard = [json.loads(line) for line in ended.stdout.splitlines()]
        assert {one["client"] for one in heard} == {f"client {number}" for number in range(6)}
        assert all(one["answers"] == ["HELLO", "HI", "你好"] for one in heard)
        assert len({one["worker"] for one in heard}) <= 4
        server.end()
        assert server.process.returncode == 0


def test_clients_of_no_server_are_dead_letters_that_say_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]

    ended = run(
        *(JOBQ, "run", EXAMPLES / "chat_client.py", "-p", f"port={port}", "-p", "clients=2"), cwd=tmp_path
    )

    assert ended.returncode == 1
    assert "ConnectionRefusedError" in ended.stderr
    [letters] = tmp_path.glob("*.dead.jsonl")
    assert [json.loads(line)["attempts"] for line in letters.read_text().splitlines()] == [4, 4]


# ── URLs ─────────────────────────────────────────────────────────────────────


def fetched(cwd: Path) -> dict[str, tuple[float, int, str]]:
    """Return seconds, arrivals and the last arrival of each way."""
    ended = run(sys.executable, EXAMPLES / "fetch_urls.py", cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    found = re.findall(r"^(.+?) +([\d.]+) s, (\d+) arrived, last (\S+)$", ended.stdout, re.MULTILINE)
    return {way: (float(seconds), int(arrived), last) for way, seconds, arrived, last in found}


def test_urls_are_fetched_in_three_ways(tmp_path: Path) -> None:
    ways = fetched(tmp_path)

    assert list(ways) == ["4 processes", "1 process, 20 threads", "1 process, 20 tasks"]
    assert [arrived for _, arrived, _ in ways.values()] == [20, 20, 20]


def test_a_slow_url_arrives_last_though_it_was_asked_for_first(tmp_path: Path) -> None:
    ways = fetched(tmp_path)

    assert {ways[way][2] for way in ("1 process, 20 threads", "1 process, 20 tasks")} == {"/0.5"}


# ── images ───────────────────────────────────────────────────────────────────

pillow = pytest.mark.skipif(
    importlib.util.find_spec("PIL") is None, reason="needs Pillow: pip install 'jobq[examples]'"
)


@pillow
def test_thumbnails_are_made_of_images_and_what_is_none_is_told(tmp_path: Path) -> None:
    ended = run(sys.executable, EXAMPLES / "thumbnails.py", cwd=tmp_path)

    assert ended.returncode == 0, ended.stderr
    *made, broken = ended.stdout.splitlines()
    assert made[0] == "thumbnails/image000.thumbnail.jpg 128 x 96"
    assert len(made) == 20
    assert broken == "not thumbnails/broken.jpg: UnidentifiedImageError"
    assert len(list(tmp_path.glob("thumbnails/*.thumbnail.jpg"))) == 20


@pillow
@pytest.mark.parametrize("backend", ["joinable", "sentinel", "pipe", "thread", "inline"])
def test_thumbnails_have_the_size_that_is_asked_for(tmp_path: Path, backend: str) -> None:
    from PIL import Image

    ended = run(
        *(JOBQ, "run", EXAMPLES / "thumbnails.py", "-b", backend, "-o", "-", "--dead-letters", "dead.jsonl"),
        *("-p", "folder=photos", "-p", "count=3", "-p", "size=64"),
        cwd=tmp_path,
    )

    assert ended.returncode == 1
    assert len(ended.stdout.splitlines()) == 3
    for line in ended.stdout.splitlines():
        thumbnail = json.loads(line)
        with Image.open(tmp_path / thumbnail["file"]) as image:
            assert image.size == (thumbnail["width"], thumbnail["height"])
            assert max(image.size) == 64
    [letter] = map(json.loads, (tmp_path / "dead.jsonl").read_text().splitlines())
    assert (letter["item"], letter["error"]) == ("photos/broken.jpg", "UnidentifiedImageError")


# ── rows ─────────────────────────────────────────────────────────────────────

CLEAN = [{"day": f"2024-05-{day:02}", "euros": f"{day * 0.9:.2f}"} for day in range(1, 31)]


@pytest.mark.parametrize("backend", ["joinable", "sentinel", "pipe", "thread", "inline"])
def test_rows_of_a_file_come_out_clean_in_their_order(tmp_path: Path, backend: str) -> None:
    rows = [f"2024-05-{day:02},{day},USD" for day in range(1, 31)]
    rows.insert(7, "2024-05-08,,USD")
    (tmp_path / "orders.csv").write_text("\n".join(["day,amount,currency", *rows]))

    ended = run(
        *(JOBQ, "run", EXAMPLES / "etl_csv.py", "-b", backend, "-p", "file=orders.csv", "-o", "-"),
        cwd=tmp_path,
    )

    assert ended.returncode == 0, ended.stderr
    assert [json.loads(line) for line in ended.stdout.splitlines()] == CLEAN


def test_rows_pass_through_a_shell_pipe_and_bad_ones_are_named(tmp_path: Path) -> None:
    lines = [
        {"day": "2024-05-01", "amount": "1", "currency": "USD"},
        {"day": "2024-05-02", "amount": 2, "currency": "USD"},
        {"day": "2024-05-02", "amount": "2", "currency": "USD"},
        {"day": "2024-05-03", "amount": "3", "currency": "XXX"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "nonsense\n")

    ended = run(
        *("sh", "-c", '"$0" run "$1" --input - -o - --dead-letters dead.jsonl < in.jsonl | cat'),
        *(JOBQ, EXAMPLES / "etl_csv.py"),
        cwd=tmp_path,
    )

    assert [json.loads(line) for line in ended.stdout.splitlines()] == CLEAN[:2]
    letters = [json.loads(line) for line in (tmp_path / "dead.jsonl").read_text().splitlines()]
    messages = sorted(letter["message"] for letter in letters)
    assert messages[0] == "no rate for currency 'XXX'"
    assert "line 2" in messages[1] and "'amount'" in messages[1]
    assert "line 5" in messages[2]


def test_a_reader_that_goes_away_ends_the_pipe(tmp_path: Path) -> None:
    row = json.dumps({"day": "2024-05-01", "amount": "1", "currency": "USD"})

    ended = run(
        *("sh", "-c", 'yes "$2" | { "$0" run "$1" --input - -o -; echo "exit $?" >&2; } | head -n 2'),
        *(JOBQ, EXAMPLES / "etl_csv.py", row),
        cwd=tmp_path,
    )

    assert [json.loads(line) for line in ended.stdout.splitlines()] == CLEAN[:1] * 2
    assert ended.stderr.rstrip().endswith("exit 141"), ended.stderr
