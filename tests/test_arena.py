"""Large items go through shared memory: nobody sees another's bytes, and no slot is lost."""

# ruff: noqa: ARG001  # jobs take items that they need not look at

from __future__ import annotations

import os
import pickle
import random
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from jobq import Job, Pipeline, Reject
from jobq import arena as module
from jobq.arena import LARGE_BYTES, LEDGER_BYTES, NOWHERE, Arena, Pickled, Region, Slot, Tenant
from jobq.shapes import shape_of
from jobq.wire import Chunk, PackedObjects, PackedPlaced, Part, PickleCodec, owned, pack, unpack
from tests.test_run import PROCESSES, Notes, run

METHODS = [("joinable", "fork"), ("sentinel", "fork"), ("pipe", "fork"), ("joinable", "spawn")]
SIZE = 40_000  # numbers, 320 kB


@pytest.fixture(params=PROCESSES)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every arena that is closed adds how many slots were leased in all, after a look that none still is."""
    leased: list[int] = []
    lease, close = Arena.lease, Arena.close
    counts: dict[Arena, int] = {}

    def counting(arena: Arena, region: int, *numbers: int) -> Any:
        counts[arena] = counts.get(arena, 0) + 1
        return lease(arena, region, *numbers)

    def closing(arena: Arena) -> None:
        if arena.fd >= 0:
            leased.append(counts.get(arena, 0))
            assert len(arena) == 0, f"{len(arena)} slots are leased at the end of the run"
        close(arena)

    monkeypatch.setattr(Arena, "lease", counting)
    monkeypatch.setattr(Arena, "close", closing)
    yield leased
    assert leased, "no arena was closed"


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena()
    yield made
    made.close()


def tenant(arena: Arena) -> Tenant:
    """Return the end of a worker that has a region of its own."""
    return Tenant(arena.fd, arena.let())


def placed(end: Tenant, data: bytes) -> Slot:
    pickled = Pickled()
    pickled.write(data)
    slot = end.place(pickled)
    assert slot is not None
    return slot


def numbers(value: float) -> np.ndarray:
    return np.full(SIZE, float(value))


# --- a region ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_slots_never_overlap_and_all_come_back(seed: int) -> None:
    chance, ledger, size = random.Random(seed), bytearray(32), 1 << 20
    region = Region(ledger, size)
    held: dict[int, tuple[int, int, int]] = {}  # by slot: generation, offset, length

    for _ in range(5000):
        if chance.random() < 0.55:
            length = chance.randrange(1, 200_000)
            taken = region.take(length)
            if taken is not None:
                index, generation, offset = taken
                assert index not in held and offset >= len(ledger) and offset + length <= size
                assert all(offset >= o + n or offset + length <= o for _, o, n in held.values())
                held[index] = (generation, offset, length)
        elif held:
            index = chance.choice(list(held))
            generation, _, _ = held.pop(index)
            if chance.random() < 0.3:
                region.give_back(index)
            else:
                ledger[index] = generation
    for index, (generation, _, _) in held.items():
        ledger[index] = generation

    assert len(region) == 0
    assert region.take(size - len(ledger) - module.GRAIN) is not None


def test_a_slot_is_not_free_before_the_ledger_says_so_however_often_it_was_used() -> None:
    ledger = bytearray(1)
    region = Region(ledger, 100_000)

    for round_ in range(1000):
        taken = region.take(10)
        assert taken is not None
        assert region.take(10) is None
        if round_ % 3:
            region.give_back(taken[0])
        else:
            ledger[0] = taken[1]


# --- the arena and its tenants -------------------------------------------------------------------


def test_a_slot_of_which_nobody_was_told_is_given_back(arena: Arena) -> None:
    end = tenant(arena)
    first = placed(end, b"a" * LARGE_BYTES)
    offset = first.offset

    del first

    assert placed(end, b"b" * LARGE_BYTES).offset == offset


def test_a_slot_that_was_told_is_free_when_its_last_lease_ends(arena: Arena) -> None:
    region = arena.let()
    end = Tenant(arena.fd, region)
    slot = placed(end, b"a" * LARGE_BYTES)
    lease = arena.lease(region, *slot.told())
    offset, other = slot.offset, lease

    del slot, lease
    assert placed(end, b"b" * LARGE_BYTES).offset != offset
    assert other.read() == b"a" * LARGE_BYTES and len(arena) == 1

    del other
    assert placed(end, b"c" * LARGE_BYTES).offset == offset
    assert len(arena) == 0


def test_the_region_of_a_worker_that_died_is_let_again_when_its_leases_have_ended(arena: Arena) -> None:
    region = arena.let()
    slot = placed(Tenant(arena.fd, region), b"a" * LARGE_BYTES)
    lease = arena.lease(region, *slot.told())

    arena.vacate(region)
    second = arena.let()
    placed(Tenant(arena.fd, second), b"b" * LARGE_BYTES)

    assert second != region and lease.read() == b"a" * LARGE_BYTES
    del lease
    assert arena.let() == region


def test_what_is_leased_can_be_read_after_the_end(arena: Arena) -> None:
    region = arena.let()
    lease = arena.lease(region, *placed(Tenant(arena.fd, region), b"a" * LARGE_BYTES).told())

    arena.close()

    assert lease.read() == b"a" * LARGE_BYTES


def test_a_place_that_is_not_the_workers_own_is_refused(arena: Arena) -> None:
    first, second = arena.let(), arena.let()
    numbers = placed(Tenant(arena.fd, first), b"a" * LARGE_BYTES).told()

    with pytest.raises(ValueError, match="outside"):
        arena.lease(second, *numbers)
    with pytest.raises(ValueError, match="outside"):
        arena.lease(first, LEDGER_BYTES, *numbers[1:])
    assert len(arena) == 0


@pytest.mark.parametrize("side", ["driver", "worker"])
def test_a_copy_of_the_process_frees_nothing_and_takes_nothing(arena: Arena, side: str) -> None:
    region = arena.let()
    end = Tenant(arena.fd, region)
    slot = placed(end, b"a" * LARGE_BYTES)
    offset = slot.offset
    lease = arena.lease(region, *slot.told()) if side == "driver" else None
    pid = os.fork()
    if pid == 0:
        arena.forget()
        del slot, lease
        pickled = Pickled()
        pickled.write(b"b" * LARGE_BYTES)
        os._exit(0 if end.place(pickled) is None else 1)

    assert os.waitpid(pid, 0)[1] == 0
    assert placed(end, b"c" * LARGE_BYTES).offset != offset


def test_memory_that_the_system_refuses_is_never_touched(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    codec = PickleCodec(tenant(arena))

    block = codec.block([codec.encode(b"a" * LARGE_BYTES), codec.encode(b"b")])

    assert codec.decode(block) == [b"a" * LARGE_BYTES, b"b"]
    assert block.nbytes == len(block.body) > LARGE_BYTES


# --- items and blocks ----------------------------------------------------------------------------


@dataclass
class Picture:
    name: str
    pixels: np.ndarray
    raw: bytes = b""
    more: dict[str, bytearray] = field(default_factory=dict)


@dataclass
class Ring:
    content: bytes
    me: object = None


class Model(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    title: str
    pixels: np.ndarray
    raw: bytes


def same(a: Any, b: Any) -> bool:
    """Whether two items have the same type and contents."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b) and a.dtype == b.dtype and a.flags.f_contiguous == b.flags.f_contiguous
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Picture | Model):
        return same(dict(vars(a)), dict(vars(b)))
    return bool(a == b)


def kinds() -> list[Any]:
    """Return large items of every kind, no two alike."""
    big = np.random.default_rng(7).random((200, 200))
    frozen = numbers(6)
    frozen.setflags(write=False)
    return [
        numbers(5),
        frozen,
        np.asfortranarray(big),
        big[::2, ::2].repeat(8, 0),
        np.random.default_rng(8).bytes(300_000),
        bytearray(np.random.default_rng(9).bytes(300_000)),
        "ä" * 200_000,
        list(range(200_000)),
        {"a": numbers(1), "b": [numbers(2), b"x" * 100_000], "c": 3},
        Picture("p", big, b"r" * 200_000, {"m": bytearray(b"q" * 100_000)}),
        Model(title="t", pixels=big * 2, raw=b"w" * 100_000),
    ]


KIND = range(len(kinds()))


@pytest.mark.parametrize("kind", KIND)
def test_items_arrive_with_memory_of_their_own(arena: Arena, kind: int) -> None:
    giver, taker = PickleCodec(tenant(arena)), PickleCodec(tenant(arena))
    item = kinds()[kind]
    giver.encode(item)
    giver.block([giver.encode(item)])

    block = giver.block([giver.encode(item), giver.encode(7), giver.encode(item)])
    first, seven, second = taker.decode(block)
    if isinstance(first, np.ndarray) and item.flags.writeable:
        first += 1

    assert isinstance(block, PackedPlaced) and block.nbytes > 2 * LARGE_BYTES > len(block.body)
    assert seven == 7 and same(second, item) and same(taker.decode(block)[0], item)


def test_an_array_that_is_changed_and_given_again_arrives_as_it_was_each_time(arena: Arena) -> None:
    codec = PickleCodec(tenant(arena))
    changed, pieces = numbers(0), []

    for i in range(5):
        changed.fill(i)
        pieces.append(codec.encode(changed))

    assert [item[-1] for item in codec.decode(codec.block(pieces))] == [0, 1, 2, 3, 4]


def test_a_part_of_a_block_holds_only_its_own_items(arena: Arena) -> None:
    region = arena.let()
    codec = PickleCodec(Tenant(arena.fd, region))
    items = [b"a" * LARGE_BYTES, b"b", b"c" * LARGE_BYTES, b"d"]
    chunk = Chunk(0, (Part(0, codec.block([codec.encode(item) for item in items])),), 4)
    said = unpack(b"".join(pack(chunk)), lambda *numbers: arena.lease(region, *numbers))
    assert isinstance(said, Chunk)
    block = said.parts[0].block
    del said

    tail = block.take(1, 4)
    assert len(arena) == 2 and tail.count == 3 and block.take(0, 0).count == 0
    assert PickleCodec(arena).decode(tail) == items[1:]
    del block
    assert len(arena) == 1 and PickleCodec(arena).decode(tail.take(1, 2)) == items[2:3]
    kept = owned(tail)
    del tail
    assert len(arena) == 0 and PickleCodec().decode(kept) == items[1:]
    assert isinstance(kept, PackedObjects) and pickle.loads(kept.take(1, 2).pickled()) == items[2]


def test_small_items_are_pickled_as_ever_again_once_no_large_ones_come(arena: Arena) -> None:
    codec = PickleCodec(tenant(arena))
    codec.block([codec.encode(b"a" * LARGE_BYTES)])
    assert codec.sockets.dump is not pickle.dumps

    for i in range(20):
        codec.block([codec.encode({"n": i})])

    assert codec.sockets.dump is pickle.dumps


def test_a_large_instance_that_holds_itself_arrives_as_one(arena: Arena) -> None:
    shape = shape_of(Ring)
    assert shape is not None
    codec = PickleCodec(tenant(arena)).shaped(shape)
    ring = Ring(b"r" * LARGE_BYTES)
    ring.me = ring

    for _ in range(3):
        [back] = codec.decode(codec.block([codec.encode(ring)]))
        assert back.me is back and back.content == ring.content
    [plain] = codec.decode(codec.block([codec.encode(Ring(b"s" * LARGE_BYTES))]))
    assert plain == Ring(b"s" * LARGE_BYTES)


def test_an_item_with_a_socket_travels_alone_however_large(arena: Arena) -> None:
    near, far = socket.socketpair()
    with near, far:
        codec = PickleCodec(tenant(arena))
        codec.block([codec.encode(b"a" * LARGE_BYTES)])

        block = codec.block([codec.encode((near, b"x" * LARGE_BYTES))])

        assert block.weight == block.nbytes > LARGE_BYTES
        codec.sockets.close()


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize(("backend", "method"), METHODS)
def test_both_takers_get_what_was_given(backend: str, method: str, books: list[int]) -> None:
    pipeline = Pipeline("kinds")
    pipeline.producer(give_kinds)
    pipeline.consumer(tell_left, name="left", workers=2, source="give_kinds")
    pipeline.consumer(tell_right, name="right", source="give_kinds")

    report = run(pipeline, backend, start_method=method)

    assert sorted(report.results) == sorted((side, i) for side in ("left", "right") for i in KIND)
    assert books[-1] >= len(KIND)


def give_kinds() -> Iterator[object]:
    yield from kinds()


def tell_left(item: object) -> tuple[str, int]:
    return "left", which(item)


def tell_right(item: object) -> tuple[str, int]:
    return "right", which(item)


def which(item: object) -> int:
    """Return which of the kinds this is, and spoil it for whoever should see it after us."""
    [found] = [i for i, kind in enumerate(kinds()) if same(kind, item)]
    if isinstance(item, np.ndarray) and item.flags.writeable:
        item.fill(-1)
    if isinstance(item, bytearray):
        item[:] = bytes(len(item))
    return found


def arrays(n: int) -> Pipeline:
    pipeline = Pipeline("arrays")

    @pipeline.producer
    def give() -> Iterator[np.ndarray]:
        same_one = numbers(0)
        for i in range(n):
            same_one.fill(i)
            yield same_one

    return pipeline


@pytest.mark.usefixtures("no_leaks")
def test_nobody_sees_anothers_bytes(backend: str, books: list[int]) -> None:
    pipeline = arrays(60)

    @pipeline.consumer(workers=2)
    def first(item: np.ndarray) -> np.ndarray:
        value = item[0]
        assert (item == value).all()
        item.fill(1000 + value)
        assert (item == 1000 + value).all()
        return item

    @pipeline.consumer(workers=2)
    def second(item: np.ndarray) -> float:
        assert (item == item[0]).all()
        return float(item[0])

    report = run(pipeline, backend)

    assert report.ok and sorted(report.results) == [1000 + i for i in range(60)]
    assert books[-1] == 120


def test_results_are_intact_when_the_run_and_its_memory_are_gone(backend: str, books: list[int]) -> None:
    pipeline = arrays(40)

    @pipeline.consumer(workers=2)
    def double(item: np.ndarray) -> np.ndarray:
        return item * 2

    report = run(pipeline, backend)
    for item in report.results:
        item[:] = item + 1

    assert sorted(item[0] for item in report.results) == [2 * i + 1 for i in range(40)]
    assert all((item == item[0]).all() for item in report.results)


@pytest.mark.usefixtures("no_leaks")
def test_a_job_that_is_tried_again_gets_the_same_bytes_again(backend: str, books: list[int]) -> None:
    pipeline = arrays(10)

    @pipeline.consumer(workers=2, max_retries=2, min_backoff=0)
    def work(item: np.ndarray, job: Job) -> float:
        value = float(item.sum()) / SIZE
        item.fill(-1)
        if job.attempt < 3:
            raise ValueError(value)
        return value

    report = run(pipeline, backend)

    assert sorted(report.results) == list(range(10))
    assert report.stages["work"].retried == 20 and books[-1] == 10


@pytest.mark.slow
@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("instant", ["reading", "working", "giving", "pickling"])
def test_deaths_lose_no_slot_and_no_byte(
    backend: str, instant: str, notes: Notes, books: list[int], tmp_path: Path
) -> None:
    pipeline = Pipeline("deaths")
    dead = [tmp_path / f"dead{i}" for i in range(12)]

    @pipeline.producer
    def give() -> Iterator[object]:
        for i in range(12):
            deadly = DiesOnUse(dead[i]) if instant == "reading" and i % 4 == 0 else None
            yield numbers(i), deadly

    @pipeline.consumer(workers=2, max_deliveries=5)
    def first(item: object) -> Iterator[object]:
        array: np.ndarray = item[0]  # type: ignore[index]
        i = int(array[0])
        assert (array == i).all()
        yield array + 100
        if instant in ("working", "giving") and i % 4 == 0 and not dead[i].exists():
            dead[i].touch()
            os.kill(os.getpid(), 9)
        if instant == "pickling" and i % 4 == 0:
            yield array + 200, DiesOnce(dead[i])

    @pipeline.consumer(workers=2)
    def second(item: object) -> None:
        array: Any = item[0] if isinstance(item, tuple) else item
        assert (array == array[0]).all()
        notes.add(int(array[0]))

    report = run(pipeline, backend, collect=False)

    expected = [100 + i for i in range(12)] + ([200, 204, 208] if instant == "pickling" else [])
    assert report.ok and sorted(set(map(int, notes.lines()))) == expected
    assert report.stages["first"].worker_restarts == 3
    assert books[-1] >= 24


class DiesOnce:
    """Kills the process that pickles it, the first time."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), 9)
        return str, ("survived",)


class DiesOnUse:
    """Kills the process that loads it, the first time."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __setstate__(self, state: dict[str, Path]) -> None:
        if not state["marker"].exists():
            state["marker"].touch()
            os.kill(os.getpid(), 9)


@pytest.mark.usefixtures("no_leaks")
def test_what_the_arena_has_no_room_for_goes_through_the_pipe(
    backend: str, books: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REGION_BYTES", 1 << 20)  # three arrays
    pipeline = arrays(50)

    @pipeline.consumer(workers=2)
    def work(item: np.ndarray) -> float:
        assert (item == item[0]).all()
        return float(item[0])

    report = run(pipeline, backend)

    assert sorted(report.results) == list(range(50))
    assert 3 <= books[-1] <= 50


@pytest.mark.usefixtures("no_leaks")
def test_where_the_system_has_no_memory_files_large_items_go_through_the_pipe(
    backend: str, monkeypatch: pytest.MonkeyPatch, books: list[int]
) -> None:
    make = os.memfd_create

    def refuse(name: str, *flags: int) -> int:
        if name == "jobq-arena":
            raise OSError(38, "Function not implemented")
        return make(name, *flags)

    monkeypatch.setattr(os, "memfd_create", refuse)
    pipeline = arrays(5)

    @pipeline.consumer
    def work(item: np.ndarray) -> float:
        return float(item[-1])

    arena = Arena()
    assert arena.let() == NOWHERE
    arena.close()
    assert sorted(run(pipeline, backend).results) == list(range(5))
    assert books == [0, 0]


@pytest.mark.usefixtures("no_leaks")
def test_a_limit_on_the_size_of_files_is_no_limit_on_items(backend: str, books: list[int]) -> None:
    pipeline = arrays(5)

    @pipeline.consumer
    def work(item: np.ndarray) -> float:
        return float(item[-1])

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        report = run(pipeline, backend)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert sorted(report.results) == list(range(5))
    assert books == [0]


@pytest.mark.usefixtures("no_leaks")
def test_dead_letters_have_their_large_items(backend: str, books: list[int], tmp_path: Path) -> None:
    pipeline = arrays(6)

    @pipeline.consumer(workers=2)
    def work(item: np.ndarray) -> None:
        if item[0] % 2:
            raise Reject("odd")

    report = run(pipeline, backend, dead_letters=tmp_path / "dead.jsonl")

    assert sorted(letter.item[-1] for letter in report.dead) == [1, 3, 5]
    assert all((letter.item == letter.item[0]).all() for letter in report.dead)
    assert len((tmp_path / "dead.jsonl").read_text().splitlines()) == 3


@pytest.mark.usefixtures("no_leaks")
def test_cancelled_jobs_have_their_large_items(backend: str) -> None:
    pipeline = arrays(12)

    @pipeline.consumer(queue_size=20)
    def work(item: np.ndarray) -> None:
        raise Reject("no")

    report = run(pipeline, backend, max_failures=1)

    assert report.dead
    assert all((letter.item == letter.item[0]).all() for letter in report.dead)


@pytest.mark.usefixtures("no_leaks")
def test_a_stream_that_is_left_early_leaves_nothing(backend: str) -> None:
    pipeline = arrays(200)

    @pipeline.consumer(workers=2)
    def work(item: np.ndarray) -> np.ndarray:
        return item

    with pipeline.stream(backend=backend) as results:
        seen = [next(results) for _ in range(3)]

    assert all((item == item[0]).all() for item in seen)
    assert len({float(item[0]) for item in seen}) == 3


@pytest.mark.usefixtures("no_leaks")
def test_futures_have_their_large_results_for_ever(backend: str, books: list[int]) -> None:
    pipeline = Pipeline("session")

    @pipeline.consumer
    def work(item: np.ndarray) -> np.ndarray:
        if item[0] == 3:
            raise ValueError("three")
        return item + 1

    with pipeline.open(backend=backend) as session:
        futures = [session.submit(numbers(i)) for i in range(5)]

    assert [future.result()[-1] for i, future in enumerate(futures) if i != 3] == [1, 2, 3, 5]
    assert isinstance(futures[3].exception(), ValueError)
