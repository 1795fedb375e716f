"""
The bytes of a channel: frames in, frames out, a page in between, and a bell to wake a selector.

A pipe's end belongs to one side each. The driver's ends never wait, the worker's do.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import tempfile
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, cast

from jobq.wire import Buffer, frame_length

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from jobq.backend import Page

READ_SIZE = 64 * 1024
#: The kernel takes no more buffers in one write.
MOST_BUFFERS = 1024
#: Larger pipes save wake-ups. Not larger still: past 64 MiB of pipes the kernel gives an ordinary user,
#: and his other programs with him, pipes of two pages only.
PIPE_SIZE = 256 * 1024
#: How the system's list of open files calls memory that jobq shares: pages and arenas.
OUR_MEMORY = "/memfd:jobq-"


class Incoming:
    """Whole frames out of a descriptor. Whether `read` waits is the descriptor's affair."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        #: Whether the last read left the pipe empty, as far as one can tell without reading again.
        self.dry = False
        self._held = memoryview(b"")
        self._large: bytearray | None = None
        self._filled = 0

    def frame(self) -> memoryview | None:
        """Return the next whole frame that was read, copying nothing."""
        if self._large is not None:
            if self._filled < len(self._large):
                return None
            large, self._large = self._large, None
            return memoryview(large)
        held = self._held
        if not held:
            return None
        length = frame_length(held)
        if length is None or length > len(held):
            return None
        self._held = held[length:]
        return held[:length]

    def read(self, size: int = READ_SIZE) -> int:
        """
        Read once and return how many bytes came (0: no writer is left).

        Called when `frame` returned None. Raises `BlockingIOError` as the descriptor does.
        """
        if self._large is None:
            held = self._held
            length = frame_length(held) if held else None
            if length is None:
                data = os.read(self.fd, size)
                self.dry = len(data) < size
                self._held = memoryview(bytes(held) + data if held else data)
                return len(data)
            # A frame that has begun gets its own memory, so that its end is read in place.
            self._large = bytearray(length)
            self._filled = len(held)
            self._large[: len(held)] = held
            self._held = memoryview(b"")
        rest = memoryview(self._large)[self._filled :]
        count = os.readv(self.fd, [rest])
        self.dry = count < len(rest)
        self._filled += count
        return count


def unwritten(buffers: Sequence[Buffer], written: int) -> list[Buffer]:
    """Return what is left of *buffers* after their first *written* bytes."""
    for index, buffer in enumerate(buffers):
        if written < len(buffer):
            return [memoryview(buffer)[written:], *buffers[index + 1 :]]
        written -= len(buffer)
    return []


class Outgoing:
    """
    The driver's end of an inbox: takes frames of any size at once, and writes what the pipe takes.

    Keeps the reading end open too, so that writing to a dead worker raises no signal in a program that
    has given SIGPIPE its default action.
    """

    def __init__(self, reader: Connection, writer: Connection) -> None:
        self.reader = reader
        self.writer = writer
        self._fd = writer.fileno()
        self._backlog: deque[Buffer] = deque()
        self._ending = False
        os.set_blocking(self._fd, False)
        widen(self._fd)

    @property
    def fd(self) -> int:
        """The descriptor to write to."""
        return self._fd

    @property
    def pending(self) -> bool:
        """Whether bytes wait for the worker to read."""
        return bool(self._backlog)

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Take *buffers*, whole."""
        if self._backlog or self._ending:
            self._backlog.extend(buffers)
        else:
            self._backlog.extend(unwritten(buffers, self._push(buffers)))

    def flush(self) -> None:
        """Write of the backlog what the pipe takes now."""
        backlog = self._backlog
        while backlog:
            buffers = list(islice(backlog, MOST_BUFFERS))
            written = self._push(buffers)
            if not written:
                return
            rest = unwritten(buffers, written)
            for _ in buffers:
                backlog.popleft()
            backlog.extendleft(reversed(rest))
        if self._ending:
            self.writer.close()

    def end(self) -> None:
        """Close the writing end as soon as everything is written."""
        self._ending = True
        self.flush()

    def abandon(self) -> None:
        """Drop what is not written, and close both ends. Idempotent."""
        self._backlog.clear()
        self._ending = True
        self.writer.close()
        self.reader.close()

    def _push(self, buffers: Sequence[Buffer]) -> int:
        try:
            return os.writev(self._fd, buffers[:MOST_BUFFERS])
        except BlockingIOError:
            return 0


def close(fd: int) -> None:
    """Close a descriptor; -1 stands for one that is closed already."""
    if fd >= 0:
        os.close(fd)


def readable(fd: int, seconds: float) -> bool:
    """Return whether a descriptor can be read from, or is at its end, within so many *seconds*."""
    poll = select.poll()  # of any number, unlike `select.select`
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def widen(fd: int) -> None:
    """Make a pipe larger, where the system lets us."""
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)


def write_whole(fd: int, buffers: Sequence[Buffer]) -> None:
    """Write *buffers* to a descriptor that waits."""
    while buffers:
        buffers = unwritten(buffers, os.writev(fd, buffers[:MOST_BUFFERS]))


#: Put the memory there, in place of what is there. The `mmap` module doesn't have the name.
MAP_FIXED = 0x10


class SharedPage:
    """64-bit words in memory without a name, which a descriptor hands to another process."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, 0)
        self._view = memoryview(self._memory).cast("q")
        self.words = cast("Page", self._view)  # a writable memoryview of "q" is a sequence of ints

    def part(self) -> None:
        """Have the words, as they are, for this process alone: it is a copy of the one that shares them."""
        import ctypes  # `mmap` can't say at which address

        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        system = ctypes.CDLL(None, use_errno=True)
        system.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
        access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
        words = self._memory[:]
        system.mmap(address, len(words), access, kind, -1, 0)
        self._memory[:] = words

    def release(self) -> None:
        """Unmap the memory. Idempotent."""
        self._view.release()
        self._memory.close()


def make_page_file(words: int) -> int:
    """Return a descriptor of memory for so many words, all zero."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("jobq-page", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, 8 * words)
    return fd


class Bell:
    """A descriptor that is readable while it has been rung: how a thread wakes a selector."""

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self.fd = self._hammer = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self.fd, self._hammer = os.pipe()
            os.set_blocking(self.fd, False)
            os.set_blocking(self._hammer, False)

    def ring(self) -> None:
        """Make the descriptor readable."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._hammer, (1).to_bytes(8, "little"))

    def hush(self) -> None:
        """Make the descriptor unreadable until the next ring."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self.fd, 4096)) == 4096:
                pass

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fds = {self.fd, self._hammer}
        self.fd = self._hammer = -1
        for fd in fds:
            close(fd)
