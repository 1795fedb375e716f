"""
Frames between processes of one machine, one run and one user, over a socket that is no file.

    Contact.ask ── frame ──> Listener ── heard(peer, bytes)
                <── frame ── Peer.send

The listener learns of a peer's death from the kernel, by pidfd: a connection may stay open, since a child of
the peer can hold it. It never waits for one peer; only its selector is waited for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from jobq.backends.channel import Incoming, close, readable
from jobq.errors import BrokenChannel, EndOfChannel
from jobq.wire import MAGIC, PREFIX

CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@dataclass(eq=False, slots=True)
class Peer:
    """One connection, and the process at its other end."""

    pid: int
    connection: socket.socket
    incoming: Incoming
    watch: Callable[[Peer], None]
    unsent: bytearray = field(default_factory=bytearray)

    def send(self, payload: bytes) -> None:
        """Take *payload* for delivery; never waits."""
        self.unsent += PREFIX.pack(MAGIC, 0, len(payload)) + payload
        self.flush()

    def flush(self) -> None:
        """Write what the connection takes now."""
        with contextlib.suppress(OSError):  # full, or gone: that is told by its end
            while self.unsent:
                del self.unsent[: self.connection.send(self.unsent, socket.MSG_NOSIGNAL)]
        self.watch(self)


class Listener:
    """
    Calls ``heard`` with each frame of a peer, ``left`` when a connection ends, ``gone`` when a process does.

    ``fd`` is readable when `serve` has something to do.
    """

    def __init__(
        self,
        address: str,
        heard: Callable[[Peer, memoryview], None],
        *,
        left: Callable[[Peer], None] = lambda _: None,
        gone: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._heard, self._left, self._gone = heard, left, gone
        self._peers: set[Peer] = set()
        self._processes: dict[int, int] = {}  # pidfds
        with contextlib.ExitStack() as undo:
            self._socket = undo.enter_context(socket.socket(socket.AF_UNIX))
            self._socket.setblocking(False)
            self._socket.bind(f"\0{address}")
            self._socket.listen(socket.SOMAXCONN)
            self._selector = undo.enter_context(selectors.EpollSelector())
            self._selector.register(self._socket, selectors.EVENT_READ)
            self._reserve = os.dup(self._socket.fileno())
            undo.pop_all()
        self.fd = self._selector.fileno()

    def serve(self, timeout: float | None = 0) -> None:
        """Deal with everything that has happened, waiting for it at most *timeout* seconds."""
        for key, happened in self._selector.select(timeout):
            if key.fileobj is self._socket:
                self._accept()
            elif isinstance(key.data, Peer):
                if key.data in self._peers:
                    self._attend(key.data, happened)
            elif isinstance(key.data, int):
                self._bury(key.data)

    def also(self, fd: int) -> None:
        """Let `serve` return when *fd* is readable, too."""
        self._selector.register(fd, selectors.EVENT_READ)

    def close(self) -> None:
        """Close every connection. Idempotent."""
        for peer in self._peers:
            peer.connection.close()
        for fd in (*self._processes.values(), self._reserve):
            close(fd)
        self._peers, self._processes, self._reserve = set(), {}, -1
        self._selector.close()
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._turn_away()
                return
            try:
                self._welcome(connection)
            except OSError:  # it has died meanwhile, or there are no descriptors left: it sees the end
                connection.close()

    def _turn_away(self) -> None:
        """Let one who connects see the end at once: without a descriptor for him he would wait for ever."""
        os.close(self._reserve)
        with contextlib.suppress(OSError):
            self._socket.accept()[0].close()
        self._reserve = os.dup(self._socket.fileno())

    def _welcome(self, connection: socket.socket) -> None:
        pid, uid, _ = CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        )
        if uid != os.geteuid() or pid <= 0:  # an abstract address is open to every user
            raise PermissionError
        if pid in self._processes and readable(self._processes[pid], 0):
            self._bury(pid)  # its number is another's now
        if pid not in self._processes:
            self._processes[pid] = os.pidfd_open(pid)
            self._selector.register(self._processes[pid], selectors.EVENT_READ, pid)
        connection.setblocking(False)
        peer = Peer(pid, connection, Incoming(connection.fileno()), self._watch)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        self._peers.add(peer)

    def _watch(self, peer: Peer) -> None:
        if peer in self._peers:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.unsent else 0)
            if self._selector.get_key(peer.connection).events != wanted:
                self._selector.modify(peer.connection, wanted, peer)

    def _attend(self, peer: Peer, happened: int) -> None:
        if happened & selectors.EVENT_WRITE:
            peer.flush()
        if not happened & selectors.EVENT_READ:
            return
        try:
            while peer in self._peers:
                frame = peer.incoming.frame()
                if frame is not None:
                    self._heard(peer, frame[PREFIX.size :])
                elif not peer.incoming.read():
                    self._drop(peer)
        except BlockingIOError:
            pass
        except (OSError, BrokenChannel):
            self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        self._peers.discard(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._left(peer)

    def _bury(self, pid: int) -> None:
        for peer in [peer for peer in self._peers if peer.pid == pid]:
            self._drop(peer)
        fd = self._processes.pop(pid)
        self._selector.unregister(fd)
        os.close(fd)
        self._gone(pid)


class Line:
    """A client's connection: send a frame, receive one, waiting for it."""

    def __init__(self, address: str) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        try:
            self._connection.connect(f"\0{address}")
        except BaseException:
            self._connection.close()
            raise
        self._incoming = Incoming(self._connection.fileno())

    def send(self, payload: bytes) -> None:
        """Send one frame, whole."""
        self._connection.sendall(PREFIX.pack(MAGIC, 0, len(payload)) + payload, socket.MSG_NOSIGNAL)

    def wait(self, timeout: float) -> bool:
        """Return whether something comes within *timeout* seconds."""
        return readable(self._connection.fileno(), max(0.0, timeout))

    def receive(self) -> memoryview:
        """Return one frame, waiting for it; raises `EndOfChannel`."""
        while (frame := self._incoming.frame()) is None:
            if not self._incoming.read():
                raise EndOfChannel
        return frame[PREFIX.size :]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Contact:
    """A process's connections to one listener: as many as it has threads that use them at once."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._idle: list[Line] = []

    @contextlib.contextmanager
    def line(self) -> Iterator[Line]:
        """Give a connection that nobody else uses meanwhile."""
        try:
            line = self._idle.pop()
        except IndexError:
            line = Line(self._address)
        try:
            yield line
        except BaseException:
            line.close()  # an answer may be on its way that nobody waits for
            raise
        self._idle.append(line)

    def close(self) -> None:
        """Close what nobody uses."""
        while self._idle:
            self._idle.pop().close()
