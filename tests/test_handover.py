"""Sockets as items: they arrive in another process, once, and nothing of them stays behind."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe

import pytest

from jobq import Pipeline
from jobq.errors import PayloadError
from jobq.handover import SocketPickler
from jobq.wire import CHUNK_BYTES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

PROCESSES = ("joinable", "sentinel", "pipe")


@pytest.fixture
def pickler() -> Iterator[SocketPickler]:
    """A pickler that leaves nothing open."""
    pickler = SocketPickler(CHUNK_BYTES)
    yield pickler
    pickler.close()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two sockets that are connected, both closed at the end."""
    near, far = socket.socketpair()
    far.settimeout(10)
    with near, far:
        yield near, far


def speak(pickled: bytes) -> None:
    """Say our process's number into a socket that was handed over."""
    with pickle.loads(pickled)["socket"] as taken:
        taken.sendall(b"%d" % os.getpid())


def test_a_socket_arrives_in_another_process_though_the_giver_closed_its_own(
    pickler: SocketPickler, ends: tuple[socket.socket, socket.socket]
) -> None:
    near, far = ends
    pickled = pickler.dumps({"socket": near})
    near.close()

    taker = multiprocessing.get_context("spawn").Process(target=speak, args=(pickled,))
    taker.start()
    said, end = far.recv(99), far.recv(99)
    taker.join(10)

    assert int(said) == taker.pid
    assert end == b"", "nobody holds a duplicate when the taker has closed the socket"
    taker.close()


def test_a_connection_arrives_as_one(pickler: SocketPickler) -> None:
    near, far = Pipe()
    with near, far, pickle.loads(pickler.dumps(near)) as taken:
        taken.send("hello")

        assert taken.fileno() != near.fileno()
        assert far.poll(10) and far.recv() == "hello"


def test_a_connection_is_never_pickled_as_its_number(pickler: SocketPickler) -> None:
    near, far = Pipe()
    with near, far, pytest.raises(TypeError, match="Connection"):
        pickle.dumps(near)

    assert pickler.dumps([1]) == pickle.dumps([1], 5)


def test_the_time_limit_of_a_socket_travels_with_it(
    pickler: SocketPickler, ends: tuple[socket.socket, socket.socket]
) -> None:
    near, _ = ends
    near.settimeout(0.25)

    with pickle.loads(pickler.dumps(near)) as taken:
        assert taken.gettimeout() == 0.25


def test_a_ticket_is_good_once(pickler: SocketPickler, ends: tuple[socket.socket, socket.socket]) -> None:
    pickled = pickler.dumps(ends[0])
    pickle.loads(pickled).close()

    with pytest.raises(PayloadError, match="handed over before"):
        pickle.loads(pickled)


def test_a_ticket_of_a_process_that_has_ended_says_so(ends: tuple[socket.socket, socket.socket]) -> None:
    pickler = SocketPickler(CHUNK_BYTES)
    pickled = pickler.dumps(ends[0])
    pickler.close()

    with pytest.raises(PayloadError, match="has ended"):
        pickle.loads(pickled)


def test_a_visitor_who_dies_or_guesses_gets_nothing_and_harms_nobody(
    pickler: SocketPickler, ends: tuple[socket.socket, socket.socket]
) -> None:
    pickled = pickler.dumps(ends[0])
    address = _address(pickled)

    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(address)
    with socket.socket(socket.AF_UNIX) as guesser:
        guesser.settimeout(10)
        guesser.connect(address)
        guesser.sendall(bytes(16))
        answer = guesser.recv(9)

    assert answer == b"-"
    pickle.loads(pickled).close()


def _address(pickled: bytes) -> bytes:
    """Return the address that a ticket names, read without using the ticket."""

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:  # noqa: ARG002  # the base's names
            return lambda *given: given

    address: bytes = Reader(io.BytesIO(pickled)).load()[0]
    return address


def test_a_closed_socket_is_refused(
    pickler: SocketPickler, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[0].close()

    with pytest.raises(ValueError, match="the socket is closed"):
        pickler.dumps(ends[0])


# ── in a pipeline ────────────────────────────────────────────────────────────


def greet(n: int) -> Iterator[socket.socket]:
    """Give sockets whose other end has spoken and hung up."""
    for i in range(n):
        near, far = socket.socketpair()
        with near, far:
            far.sendall(b"%d" % i)
            yield near


def listen(caller: socket.socket) -> tuple[int, str]:
    with caller:
        return os.getpid(), caller.recv(99).decode()


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize("backend", PROCESSES)
def test_a_stage_takes_sockets_of_a_producer_that_has_ended(backend: str, start_method: str) -> None:
    pipeline = Pipeline("calls")
    pipeline.producer(greet)
    pipeline.consumer(listen, workers=2)

    report = pipeline.run(n=30, backend=backend, start_method=start_method, collect=True)

    pids, words = zip(*report.results, strict=True)
    assert sorted(map(int, words)) == list(range(30))
    assert os.getpid() not in pids


@pytest.mark.parametrize("backend", PROCESSES)
def test_a_submitted_socket_arrives(backend: str, ends: tuple[socket.socket, socket.socket]) -> None:
    pipeline = Pipeline("calls")
    pipeline.consumer(listen)
    ends[1].sendall(b"7")

    with pipeline.open(backend=backend, start_method="fork") as run:
        pid, word = run.submit(ends[0]).result(timeout=30)

    assert word == "7" and pid != os.getpid()


def test_a_connection_as_an_item_is_the_one_that_was_given() -> None:
    pipeline = Pipeline("wires")
    pipeline.consumer(answer)
    near, far = Pipe()

    with near, far, pipeline.open(start_method="fork") as run:
        run.submit(near).result(timeout=30)
        assert far.poll(10) and far.recv() == "answered"


def answer(wire: Connection) -> None:
    with wire:
        wire.send("answered")


def test_a_socket_whose_worker_died_is_a_dead_letter_that_says_why() -> None:
    pipeline = Pipeline("calls")
    pipeline.producer(greet)
    pipeline.consumer(die)

    report = pipeline.run(n=1, check=False)

    [letter] = report.dead
    assert "handed over before" in letter.message


def die(caller: socket.socket) -> None:
    os._exit(caller.fileno() and 1)
