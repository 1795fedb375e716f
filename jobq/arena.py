"""
Large items in shared memory: copied once where they are given, and once where they are taken.

    giver ── copies into its region ──> Slot ──place──> driver: Lease ──place──> taker copies out of it
      ^                                                    │
      └──────── a byte of the region's ledger <────────────┘ when no block refers to it any more

The arena is one memory file without a name. Each worker has a region of it, in which it alone gives out
slots, by its own list (`Region`). The driver alone says which are free again: it writes the slot's
generation into the ledger, at the region's start. So no word has two writers, and no lock two processes.

A slot is held by the blocks in the driver's books that refer to it: as long as its item is queued, in flight
at any taker, to be tried again or not yet read by whoever wants the results. What a worker that died had not
told the driver of was never leased; its region is given to another worker when all leases of it have ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import weakref
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from pickle import PickleBuffer
from typing import Any, TypeAlias

Buffer: TypeAlias = bytes | memoryview

#: Items whose pickle is at least so long go through the arena. (Measured, an item by pipe and by arena: 10 KB
#: 28 and 25 us, 20 KB 71 and 33, 40 KB 250 and 73, on two slow cores; as results they cost the same.)
LARGE_BYTES = 16 * 1024
#: What one worker may give at most. Addresses, not memory: that is used only as far as it was ever needed.
REGION_BYTES = 256 * 1024 * 1024
#: The start of a region: a byte for each slot.
LEDGER_BYTES = 4096
#: Slots begin at pages: those that were never used are not touched.
GRAIN = mmap.PAGESIZE
#: No region: large items go through the pipe.
NOWHERE = -1

#: The pickler writes contents from this length on by themselves, uncopied, right after what announces them.
CONTENT_BYTES = 64 * 1024
ANNOUNCEMENTS = (b"\x8e\x8d\x96", b"BX")  # BINBYTES8, BINUNICODE8, BYTEARRAY8; BINBYTES, BINUNICODE

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14; the mmap module has no names for them
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MOST_MMAP_THRESHOLD = 32 * 1024 * 1024  # it takes no more
KEPT_BYTES = 128 * 1024 * 1024


class Place:
    """Where an item lies: slot and generation in its giver's region, offset in the arena, and length."""

    __slots__ = ("generation", "index", "length", "offset")

    def __init__(self, index: int, generation: int, offset: int, length: int) -> None:
        self.index = index
        self.generation = generation
        self.offset = offset
        self.length = length

    def __len__(self) -> int:
        return self.length

    def told(self) -> tuple[int, int, int, int]:
        """Return it as numbers, for whoever is told of it."""
        return self.index, self.generation, self.offset, self.length


class Slot(Place):
    """A place that its giver holds: given back if the driver is never told of it."""

    __slots__ = ("_tenant", "pickled")

    def __init__(self, tenant: Tenant, pickled: Pickled, *numbers: int) -> None:
        super().__init__(*numbers)
        self._tenant: Tenant | None = tenant
        self.pickled = pickled

    def __contains__(self, needle: bytes) -> bool:
        """Whether *needle* is in the pickle, outside of long contents."""
        return needle in self.pickled

    def __bytes__(self) -> bytes:
        assert self._tenant is not None
        return bytes(self._tenant.view(self))

    def told(self) -> tuple[int, int, int, int]:
        """Return it as numbers; from now on the driver says when it is free."""
        self._tenant = None
        return super().told()

    def __del__(self) -> None:
        if self._tenant is not None:
            self._tenant.take_back(self)


class Lease(Place):
    """A place as the driver knows it: the slot is free when the last reference to this has gone."""

    __slots__ = ("__weakref__", "_arena", "region", "rescued")

    def __init__(self, arena: Arena, region: int, *numbers: int) -> None:
        super().__init__(*numbers)
        self._arena = arena
        self.region = region
        self.rescued: bytes | None = None

    def read(self) -> bytes:
        """Return a copy of what lies there."""
        return self._arena.read(self)

    def __del__(self) -> None:
        self._arena.end(self)


# ── the giver's books ────────────────────────────────────────────────────────


class Region:
    """
    Gives out slots of ``size`` bytes, the lowest that fit: what was used last is still in the caches.

    *ledger* is written by somebody else: slot i is free again when ``ledger[i]`` is its generation.
    """

    def __init__(self, ledger: Sequence[int], size: int) -> None:
        self._ledger = ledger
        self._free: list[tuple[int, int]] = [(len(ledger), size - len(ledger))]  # (offset, length), sorted
        self._generations = bytearray(len(ledger))
        self._unused = list(range(len(ledger) - 1, -1, -1))
        self._taken: dict[int, tuple[int, int]] = {}
        self._countdown = 0

    def __len__(self) -> int:
        self._sweep()
        return len(self._taken)

    def take(self, length: int) -> tuple[int, int, int] | None:
        """Return a free slot of *length* as (index, generation, offset); None if there is none."""
        size = -(-length // GRAIN) * GRAIN
        self._countdown -= 1
        swept = self._countdown < 0
        if swept:
            self._sweep()
        place = self._find(size)
        if place is None and not swept:
            self._sweep()
            place = self._find(size)
        if place is None or not self._unused:
            return None
        offset, room = self._free[place]
        self._free[place : place + 1] = [(offset + size, room - size)] if room > size else []
        index = self._unused.pop()
        generation = self._generations[index] = (self._generations[index] + 1) & 0xFF
        self._taken[index] = (offset, size)
        return index, generation, offset

    def give_back(self, index: int) -> None:
        """Free a slot of which nobody was told."""
        self._generations[index] = (self._generations[index] - 1) & 0xFF  # the ledger never comes to it
        self._release(index)

    def _find(self, size: int) -> int | None:
        return next((place for place, (_, room) in enumerate(self._free) if room >= size), None)

    def _sweep(self) -> None:
        ledger, generations = self._ledger, self._generations
        for index in [index for index in self._taken if ledger[index] == generations[index]]:
            self._release(index)
        self._countdown = len(self._taken) // 8  # so that looking costs little, however many there are

    def _release(self, index: int) -> None:
        offset, size = self._taken.pop(index)
        self._unused.append(index)
        free = self._free
        at = bisect_left(free, (offset, 0))
        if at < len(free) and offset + size == free[at][0]:
            size += free.pop(at)[1]
        if at and sum(free[at - 1]) == offset:
            offset, size = free[at - 1][0], free[at - 1][1] + size
            at -= 1
            free.pop(at)
        free.insert(at, (offset, size))


class Pickled:
    """What a pickler writes: contents that are long are kept as they are until they are copied."""

    def __init__(self) -> None:
        self.parts: list[Buffer] = []
        self.length = 0
        self._heads: list[bytes] = []

    def write(self, data: Any) -> None:
        """Take what is next."""
        if type(data) is not bytes:  # its memory can't be given away as long as we have a view of it
            data = data.raw() if type(data) is PickleBuffer else memoryview(data)
        elif len(data) < CONTENT_BYTES or not self._is_announced(len(data)):
            self._heads.append(data)
        self.parts.append(data)
        self.length += len(data)

    def _is_announced(self, length: int) -> bool:
        """Whether the pickle so far ends with the word that so many bytes of contents follow."""
        last = bytes(self.parts[-1][-9:]) if self.parts else b""
        return any(
            last[-size - 1 : -size] in opcodes and last[-size:] == length.to_bytes(size, "little")
            for size, opcodes in zip((8, 4), ANNOUNCEMENTS, strict=True)
            if len(last) > size
        )

    def __contains__(self, needle: bytes) -> bool:
        return any(needle in head for head in self._heads)

    def __bytes__(self) -> bytes:
        return b"".join(self.parts)


# ── a worker's end ───────────────────────────────────────────────────────────


class Tenant:
    """
    A worker's use of the arena: it writes into its own region, and reads any.

    Nothing is mapped before the first large item comes. Safe for the threads of one process; a copy of the
    process gives nothing.
    """

    def __init__(self, fd: int, region: int) -> None:
        self._fd = fd
        self._file = _identity(fd)
        self._number = region
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a slot may be given back in the middle of anything
        self._region: Region | None = None
        self._own = memoryview(b"")
        self._grown = 0
        self._windows: dict[int, _Window] = {}

    def place(self, pickled: Pickled) -> Slot | None:
        """Copy an item into the arena; None if there is no room for it."""
        if os.getpid() != self._pid:
            return None  # a job has forked: the slots are our parent's
        length = pickled.length
        with self._lock:
            taken = self._take(length)
        if taken is None:
            return None
        index, generation, at = taken
        slot = Slot(self, pickled, index, generation, self._number * REGION_BYTES + at, length)
        own = self._own
        for part in pickled.parts:
            end = at + len(part)
            own[at:end] = part
            at = end
        pickled.parts = []
        return slot

    def take_back(self, slot: Slot) -> None:
        """Free a slot of which the driver was not told."""
        if os.getpid() == self._pid and self._region is not None:
            with self._lock:
                self._region.give_back(slot.index)

    def view(self, place: Place) -> memoryview:
        """Return what lies at a place, to be read while its job is in hand; raises `OSError`."""
        number, at = divmod(place.offset, REGION_BYTES)
        window = self._windows.get(number)
        if window is None:
            keep_freed_memory()
            window = self._windows.setdefault(number, _Window(self._map(number, mmap.PROT_READ)))
        return window.view(at, at + place.length)

    def _take(self, length: int) -> tuple[int, int, int] | None:
        if self._region is None:
            try:
                self._own = memoryview(self._map(self._number, mmap.PROT_READ | mmap.PROT_WRITE))
            except OSError:
                return None  # no addresses left (RLIMIT_AS)
            keep_freed_memory()
            self._region = Region(self._own[:LEDGER_BYTES], REGION_BYTES)
        taken = self._region.take(length)
        if taken is None or self._grow(taken[2] + length):
            return taken
        self._region.give_back(taken[0])
        return None

    def _grow(self, size: int) -> bool:
        """
        Have memory for the first *size* bytes of the region; return whether the system gave it.

        Memory that is only promised would kill us when it is touched.
        """
        if size <= self._grown:
            return True
        start = self._grown // GRAIN * GRAIN
        try:
            self._make_sure()
            os.posix_fallocate(self._fd, self._number * REGION_BYTES + start, size - start)
        except OSError:
            return False
        with contextlib.suppress(OSError):
            _mmap_of(self._own).madvise(MADV_POPULATE_WRITE, start, size - start)
        self._grown = size
        return True

    def _map(self, number: int, access: int) -> mmap.mmap:
        self._make_sure()
        return mmap.mmap(self._fd, REGION_BYTES, prot=access, offset=number * REGION_BYTES)

    def _make_sure(self) -> None:
        """Raise `OSError` if a job has closed the descriptor, which may name another file by now."""
        if _identity(self._fd) != self._file:
            raise OSError("a job closed the descriptor of the shared memory for large items")


class _Window:
    """One region, mapped for reading."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._view = memoryview(memory)
        self._seen = 0

    def view(self, low: int, high: int) -> memoryview:
        if high > self._seen:
            start = self._seen // GRAIN * GRAIN
            with contextlib.suppress(OSError):  # page by page it takes thirty times as long
                self._memory.madvise(MADV_POPULATE_READ, start, high - start)
            self._seen = high
        return self._view[low:high]


def _mmap_of(view: memoryview) -> mmap.mmap:
    memory: mmap.mmap = view.obj  # type: ignore[assignment]  # what the view was made of
    return memory


def _identity(fd: int) -> tuple[int, int]:
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


def keep_freed_memory() -> None:
    """
    Let glibc keep what is freed, up to `KEPT_BYTES`, for the next large item.

    Else it goes back to the system, and comes again page by page, which takes longer than the copy.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        import ctypes

        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MOST_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


# ── the driver's end ─────────────────────────────────────────────────────────


class Arena:
    """
    The driver's end: lets regions to workers, and knows which slots are leased.

    ``fd`` is for workers. Where the system has no memory files it is of no use, and no region is let.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a lease may end in the middle of anything, in any thread
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._leased = array("Q")  # by region
        self._let: set[int] = set()
        try:
            self.fd = os.memfd_create("jobq-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            # Nobody can take memory away from under those who have mapped it.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        except (OSError, AttributeError):
            self.fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

    def __len__(self) -> int:
        """How many slots are leased."""
        return sum(self._leased)

    def let(self) -> int:
        """Return the number of a region for a new worker, or `NOWHERE`."""
        with self._lock:
            number = next((n for n, held in enumerate(self._leased) if not held and n not in self._let), None)
            try:
                if number is None:
                    number = len(self._leased)
                    os.ftruncate(self.fd, (number + 1) * REGION_BYTES)
                    self._leased.append(0)
                else:
                    os.pwrite(self.fd, bytes(LEDGER_BYTES), number * REGION_BYTES)
            except OSError:  # RLIMIT_FSIZE, no memory files
                return NOWHERE
            self._let.add(number)
            return number

    def vacate(self, region: int) -> None:
        """Take back a region: its worker has gone. Idempotent."""
        with self._lock:
            self._let.discard(region)

    def lease(self, region: int, *numbers: int) -> Lease:
        """Return the lease of a slot of which its giver told us; raises `ValueError` if it isn't his."""
        index, _, offset, length = numbers
        start = region * REGION_BYTES
        inside = start + LEDGER_BYTES <= offset and offset + length <= start + REGION_BYTES
        if region not in self._let or not inside or not 0 <= index < LEDGER_BYTES:
            raise ValueError("a place outside of the worker's region")
        with self._lock:
            lease = Lease(self, region, *numbers)
            self._leased[region] += 1
            self._leases.add(lease)
        return lease

    def end(self, lease: Lease) -> None:
        """Let the giver use a slot again."""
        if self.fd < 0:  # a copy of the driver's process, where the lock may be held for ever
            return
        with self._lock:
            if self.fd >= 0:
                self._leased[lease.region] -= 1
                at = lease.region * REGION_BYTES + lease.index
                os.pwrite(self.fd, bytes((lease.generation,)), at)

    def read(self, lease: Lease) -> bytes:
        """Return a copy of what was leased, also after `close`."""
        with self._lock:
            if lease.rescued is not None:
                return lease.rescued
            return _read(self.fd, lease.offset, lease.length)

    def view(self, place: Place) -> bytes:
        """Return what lies at a place."""
        assert isinstance(place, Lease)
        return place.read()

    def place(self, pickled: Pickled) -> Slot | None:  # noqa: ARG002  # as `Tenant.place`
        """Return None: what the driver's own process gives goes through the pipe."""
        return None

    def close(self) -> None:
        """Give the memory back; what is leased still is copied out of it. Idempotent."""
        with self._lock:
            if self.fd < 0:
                return
            for lease in list(self._leases):
                lease.rescued = _read(self.fd, lease.offset, lease.length)
            fd, self.fd = self.fd, -1
            os.close(fd)

    def forget(self) -> None:
        """Close the descriptor only: this is a copy of the driver's process. Idempotent."""
        fd, self.fd = self.fd, -1
        self._lock = threading.RLock()
        if fd >= 0:
            os.close(fd)


def _read(fd: int, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    while len(data) < length:  # the system gives 2 GiB at a time
        data += os.pread(fd, length - len(data), offset + len(data))
    return data
