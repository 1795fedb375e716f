"""
Sockets as items of process backends: the process that takes the item gets the socket itself.

    encode: keep a duplicate, pickle a ticket ──bytes──> driver ──bytes──> decode: ask with the ticket ─┐
    attendant: a thread with an abstract AF_UNIX address  <──ticket──   ──the descriptor──> socket  <───┘

A socket can't be copied, so a ticket is good once: the peer of a worker that dies sees the end of its
connection, and the job's next try is a dead letter that says why. `multiprocessing` has a way of its own,
which leaves a socket file behind when the giver is killed.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from jobq.errors import PayloadError

PROTOCOL = 5
TICKET_BYTES = 16
#: Seconds to wait for the other end, which answers at once unless it is stopped.
PATIENCE = 5.0


class Cloakroom:
    """Keeps duplicates of descriptors for whoever comes with the ticket. Its thread starts with the first."""

    def __init__(self) -> None:
        self._kept: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._attendant: threading.Thread | None = None
        self._owner = os.getpid()

    def keep(self, fd: int) -> tuple[bytes, bytes]:
        """Return the address and the ticket for which a duplicate of *fd* is handed out, once."""
        if sys.platform != "linux":
            raise TypeError("sockets go to another process on Linux only: use backend='thread'")
        if fd < 0:
            raise ValueError("the socket is closed")
        if os.getpid() != self._owner:
            raise TypeError("a process that a job forked can't hand over sockets")
        ticket = secrets.token_bytes(TICKET_BYTES)
        with self._lock:
            address = self._open()
            self._kept[ticket] = os.dup(fd)
        return address, ticket

    def close(self) -> None:
        """Close what nobody came for; the thread has ended then. Idempotent."""
        if self._listener is None or os.getpid() != self._owner:
            return
        self._listener.shutdown(socket.SHUT_RDWR)
        assert self._attendant is not None
        self._attendant.join()
        self._listener.close()
        self._listener = None
        while self._kept:
            os.close(self._kept.popitem()[1])

    def _open(self) -> bytes:
        if self._listener is None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(b"")  # the system chooses an abstract address: no file, gone with us
            self._listener.listen(1024)
            self._attendant = threading.Thread(target=self._attend, name="jobq-handover", daemon=True)
            self._attendant.start()
        address: bytes = self._listener.getsockname()
        return address

    def _attend(self) -> None:
        assert self._listener is not None
        while True:
            try:
                visitor, _ = self._listener.accept()
            except OSError:
                return
            with visitor:
                try:
                    visitor.settimeout(PATIENCE)
                    self._serve(visitor)
                except OSError:
                    continue  # it died, or says nothing

    def _serve(self, visitor: socket.socket) -> None:
        _, uid, _ = struct.unpack("3i", visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        ticket = visitor.recv(TICKET_BYTES, socket.MSG_WAITALL)
        with self._lock:
            fd = self._kept.pop(ticket, None) if uid == os.getuid() else None
        if fd is None:
            visitor.send(b"-")
            return
        try:
            socket.send_fds(visitor, [b"+"], [fd])
        finally:
            os.close(fd)


class Ticketed(bytes):
    """
    A piece with a ticket, as long as a chunk may be, or longer, so that it travels alone.

    In a longer chunk a ticket would be used when that is opened, and its job be taken back from behind a slow
    one.
    """


class SocketPickler:
    """
    Pickles what `pickle` does, and sockets and connections as tickets of a cloakroom of its own.

    *chunk_bytes* are as many as a chunk may have.
    """

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        #: What pickles anything but sockets.
        self.dump: Callable[[Any, int], Any] = pickle.dumps
        self._cloakroom = Cloakroom()
        self._reducers: dict[type, Callable[[Any], Any]] = {
            **copyreg.dispatch_table,
            socket.socket: self._reduce_socket,
            Connection: self._reduce_connection,
        }
        # By itself a connection is pickled as its descriptor's number, which elsewhere is another file.
        copyreg.pickle(Connection, _refuse)

    def dumps(self, item: Any) -> Any:  # bytes, or whatever `dump` makes
        """Return *item* pickled as it is now; raises whatever pickling it raises."""
        try:
            dump = self.dump  # half the price of a method call
            return dump(item, PROTOCOL)
        except TypeError:  # what a socket raises; most that raise it have none, and raise it again
            return self._dumps_with_sockets(item)

    def close(self) -> None:
        """Close the sockets that nobody has taken. Idempotent."""
        self._cloakroom.close()

    def _dumps_with_sockets(self, item: Any) -> bytes:
        file = io.BytesIO()
        pickler = pickle.Pickler(file, PROTOCOL)
        pickler.dispatch_table = self._reducers
        pickler.dump(item)
        return Ticketed(
            file.getvalue().ljust(self._chunk_bytes, b"\0")
        )  # what follows a pickle's end is not read

    def _reduce_socket(self, given: socket.socket) -> tuple[Any, ...]:
        return take_socket, (*self._cloakroom.keep(given.fileno()), given.gettimeout())

    def _reduce_connection(self, given: Connection) -> tuple[Any, ...]:
        fd = -1 if given.closed else given.fileno()
        return take_connection, (*self._cloakroom.keep(fd), given.readable, given.writable)


def _refuse(given: object) -> NoReturn:
    raise TypeError(f"cannot pickle {type(given).__name__!r} object")


def take_socket(address: bytes, ticket: bytes, timeout: float | None) -> socket.socket:
    """Return the socket that is kept at *address* for *ticket*; raises `PayloadError` if it isn't."""
    taken = socket.socket(fileno=take(address, ticket))
    taken.settimeout(timeout)  # whether it waits is a mark of the open file, which all duplicates share
    return taken


def take_connection(address: bytes, ticket: bytes, readable: bool, writable: bool) -> Connection:
    """Return the connection that is kept at *address* for *ticket*; raises `PayloadError` if it isn't."""
    return Connection(take(address, ticket), readable, writable)


def take(address: bytes, ticket: bytes) -> int:
    """Return a descriptor of what is kept at *address* for *ticket*; raises `PayloadError` if nothing is."""
    with socket.socket(socket.AF_UNIX) as visit:
        visit.settimeout(PATIENCE)
        try:
            visit.connect(address)
            visit.sendall(ticket)
            _, fds, _, _ = socket.recv_fds(visit, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise PayloadError(
                f"the process that gave the socket has ended, and the socket with it ({error})"
            ) from error
    if not fds:
        raise PayloadError(
            "the socket was handed over before: it goes to one job, once;"
            " not to the job's next try, nor to a second taker"
        )
    return fds[0]
