"""Items, producers, and what lies on the wire: each row of chapter B, as a user meets it."""

from __future__ import annotations

import ast
import os
import signal
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import jobq as package
from jobq import Pipeline
from tests.faults.command import PREAMBLE, Ended, jobq
from tests.faults.rows import fault, out_of_reach, proves
from tests.test_run import PROCESSES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

#: Two stages of numbers, for faults that are set from outside.
TWO_STAGES = """
@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(20)

@pipeline.consumer(workers=2)
def first(i: int) -> int:
    return i

@pipeline.consumer
def second(i: int, job: Job) -> int:
    note(f"{i} {job.id}")
    return i
"""


QUEUE_STATES = (".empty", ".full", ".qsize", ".get_nowait")


@pytest.fixture(params=PROCESSES)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def line_of(text: str, words: str) -> int:
    """Return the number of the line of the pipeline's file that has *words* in it."""
    lines = (PREAMBLE + text).splitlines()
    return next(number for number, line in enumerate(lines, 1) if words in line)


def entered(ended: Ended) -> list[int]:
    """Return the items that entered the second of `TWO_STAGES`, once for each time that they did."""
    return sorted(int(line.split()[0]) for line in set(ended.notes))


# --- items that don't travel ---------------------------------------------------------------------


@fault(
    "B1",
    "an item can't be pickled",
    items="dead; all others done",
    sees="`item 1 failed in stage things: PayloadError: an item that things() yields (faulty.py:29) cannot be"
    " pickled: TypeError: cannot pickle '_thread.lock' object`, with the line of the yield",
    exit=1,
)
def test_an_item_that_cant_be_pickled_is_named_with_the_line_of_its_yield(tmp_path: Path) -> None:
    text = """
@pipeline.producer
def things() -> Iterator[object]:
    yield 1
    yield threading.Lock()
    yield 3

@pipeline.consumer
def take(thing: object) -> object:
    return thing
"""
    ended = jobq(tmp_path, text)

    where = f"faulty.py:{line_of(text, 'yield threading.Lock()')}"
    assert (
        f"item 1 failed in stage things: PayloadError: an item that things() yields ({where}) cannot be"
        " pickled: TypeError: cannot pickle '_thread.lock' object"
    ) in ended.said
    assert sorted(ended.results) == [1, 3]
    assert [(letter["stage"], letter["item_type"]) for letter in ended.dead] == [("things", "lock")]
    assert ended.code == 1


@fault(
    "B2",
    "pickling an item raises SystemExit, or another BaseException",
    items="dead; all others done",
    sees="`… cannot be pickled: SystemExit: 7`",
    exit=1,
)
@pytest.mark.parametrize("error", ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "BaseException"])
def test_whatever_pickling_raises_costs_that_item_only(error: str, tmp_path: Path) -> None:
    text = f"""
class Refuses:
    def __reduce__(self):
        raise {error}(7)

@pipeline.producer
def things() -> Iterator[object]:
    yield 1
    yield Refuses()
    yield 3

@pipeline.consumer
def take(thing: object) -> object:
    return Refuses() if thing == 3 else thing
"""
    ended = jobq(tmp_path, text)

    assert f"cannot be pickled: {error}: 7" in ended.said
    assert ended.results == [1]
    assert Counter(letter["stage"] for letter in ended.dead) == {"things": 1, "take": 1}
    assert ended.code == 1


@fault(
    "B3",
    "an item raises when it is loaded",
    items="dead; the worker lives",
    sees="`item 1 failed in stage take: PayloadError: an item for take() could not be loaded: ValueError: not"
    " me`",
    exit=1,
)
@pytest.mark.parametrize("error", ["ValueError", "SystemExit"])
def test_an_item_that_fails_to_load_is_a_dead_letter_of_its_taker(
    error: str, backend: str, tmp_path: Path
) -> None:
    text = f"""
def refuse():
    raise {error}("not me")

class Unloadable:
    def __reduce__(self):
        return refuse, ()

@pipeline.producer
def things() -> Iterator[object]:
    yield from (1, Unloadable(), 3)

@pipeline.consumer
def take(thing: object) -> object:
    return thing
"""
    ended = jobq(tmp_path, text, "-b", backend)

    assert (
        f"item 1 failed in stage take: PayloadError: an item for take() could not be loaded: {error}: not me"
    ) in ended.said
    assert sorted(ended.results) == [1, 3]
    assert "replaced" not in ended.said
    assert ended.code == 1


@fault(
    "B4",
    "loading an item kills the process",
    items="again, alone; dead after `max_deliveries`; nobody else loads it",
    sees="`item 1 of stage take killed its worker 2 times and is given up`",
    exit=1,
)
def test_an_item_that_kills_whoever_loads_it_is_a_dead_letter_that_nobody_loads(
    backend: str, tmp_path: Path
) -> None:
    text = """
class Deadly:
    def __reduce__(self):
        return die, ()

@pipeline.producer
def things() -> Iterator[object]:
    yield from (1, Deadly(), 3)

@pipeline.consumer(max_deliveries=2)
def take(thing: object) -> object:
    return thing
"""
    ended = jobq(tmp_path, text, "-b", backend)

    assert "item 1 of stage take killed its worker 2 times and is given up" in ended.said
    assert sorted(ended.results) == [1, 3]
    assert [(letter["error"], letter["deliveries"]) for letter in ended.dead] == [("WorkerLost", 2)]
    assert ended.code == 1


@fault(
    "B5",
    "a job raises an exception that can be pickled, and not loaded",
    items="dead",
    sees="`item 0 failed in stage take: TwoWords: one`: errors travel as text",
    exit=1,
)
def test_an_exception_that_cant_be_loaded_is_told_as_text(tmp_path: Path) -> None:
    text = """
class TwoWords(Exception):
    def __init__(self, one, two):
        super().__init__(one)

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(3)

@pipeline.consumer
def take(i: int) -> int:
    if i == 0:
        raise TwoWords("one", "two")
    return i
"""
    ended = jobq(tmp_path, text)

    assert "item 0 failed in stage take: TwoWords: one" in ended.said
    assert 'raise TwoWords("one", "two")' in ended.said
    assert sorted(ended.results) == [1, 2]
    assert ended.code == 1


@fault(
    "B6",
    "a job's exception can't be pickled, or its `str()` raises, or holds characters that can't be written",
    items="dead",
    sees="`Mute: <Mute: str() raised ValueError>`; what can't be written as `\\ud800`",
    exit=1,
)
def test_an_exception_that_cant_even_be_shown_is_told(tmp_path: Path) -> None:
    text = """
class Locked(Exception):
    def __init__(self):
        super().__init__("locked")
        self.lock = threading.Lock()

class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")

ERRORS = [Locked, Mute, lambda: OSError("half \\ud800 pair")]

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(4)

@pipeline.consumer
def take(i: int) -> int:
    if i < 3:
        raise ERRORS[i]()
    return i
"""
    ended = jobq(tmp_path, text)

    for message in ("Locked: locked", "Mute: <Mute: str() raised ValueError>", "OSError: half \\ud800 pair"):
        assert message in ended.said
    assert ended.results == [3]
    assert len(ended.dead) == 3
    assert ended.code == 1


@fault(
    "B7",
    "an object is changed after it was yielded or returned",
    items="done, as they were at that moment",
    sees="nothing",
    exit=0,
)
def test_an_item_arrives_as_it_was_when_it_was_yielded(backend: str, tmp_path: Path) -> None:
    text = """
@pipeline.producer
def same() -> Iterator[dict[str, int]]:
    changed = {"n": -1}
    for n in range(20):
        changed["n"] = n
        yield changed
    changed.clear()

@pipeline.consumer
def split(one: dict[str, int]) -> Iterator[list[int]]:
    out = [one["n"], 0]
    yield out
    out[1] = 1
    yield out
    out.clear()

@pipeline.consumer
def keep(one: list[int]) -> list[int]:
    return one
"""
    ended = jobq(tmp_path, text, "-b", backend)

    assert sorted(ended.results) == [[n, i] for n in range(20) for i in (0, 1)]
    assert ended.code == 0


@fault(
    "B8",
    "an item is nested too deeply for pickle",
    items="dead",
    sees="`… cannot be pickled: RecursionError: …; it is nested too deeply (the recursion limit is 1000)`",
    exit=1,
)
def test_an_item_nested_too_deeply_is_told_with_the_limit(tmp_path: Path) -> None:
    text = """
def deep():
    inner = []
    for _ in range(100_000):
        inner = [inner]
    return inner

@pipeline.producer
def things() -> Iterator[object]:
    yield from (1, deep(), 3)

@pipeline.consumer
def take(thing: object) -> object:
    return deep() if thing == 3 else thing
"""
    ended = jobq(tmp_path, text)

    assert ended.said.count("it is nested too deeply (the recursion limit is 1000)") >= 2
    assert ended.results == [1]
    assert Counter(letter["stage"] for letter in ended.dead) == {"things": 1, "take": 1}
    assert ended.code == 1


@fault(
    "B9",
    "an int of more than 4300 digits, whose `repr()` raises",
    items="done; where its job fails dead, pickled in the file since no JSON reader takes it",
    sees="`item 0 failed in stage take: ValueError: odd`",
    exit=1,
)
def test_an_int_that_cant_be_shown_travels_and_fails_like_any_other(tmp_path: Path) -> None:
    text = """
@pipeline.producer
def numbers() -> Iterator[int]:
    yield 10 ** 6000 + 1
    yield 10 ** 6000

@pipeline.consumer
def take(i: int) -> int:
    if i % 2:
        raise ValueError("odd")
    return i.bit_length()
"""
    ended = jobq(tmp_path, text)

    assert "item 0 failed in stage take: ValueError: odd" in ended.said
    assert ended.results == [(10**6000).bit_length()]
    assert ["item_pickle" in letter for letter in ended.dead] == [True]
    assert ended.code == 1


@fault(
    "B10",
    "surrogates, NUL and letters beyond ASCII, where standard error takes ASCII only",
    items="done, or dead with their text whole",
    sees="`ValueError: \\ud800 \\x00 \\xe9`",
    exit=1,
)
def test_text_that_cant_be_written_is_written_all_the_same(tmp_path: Path) -> None:
    text = """
@pipeline.producer
def texts() -> Iterator[str]:
    yield "\\ud800 \\0 \\xe9"
    yield "\\0 \\xe9"

@pipeline.consumer
def take(text: str) -> str:
    if "\\ud800" in text:
        raise ValueError(text)
    return text
"""
    ended = jobq(
        tmp_path, text, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii:strict"
    )

    assert "item 0 failed in stage take: ValueError: \\ud800 \\x00 \\xe9" in ended.said
    assert ended.said.isascii()
    assert ended.results == ["\0 \xe9"]
    assert len(ended.dead) == 1
    assert ended.code == 1


# --- items of all sizes --------------------------------------------------------------------------


@fault(
    "B11",
    "the reader of an item that is larger than a pipe dies half way, or never comes",
    items="again",
    sees="`worker 1 of stage take (pid 4711) was killed by SIGKILL …`",
    exit=0,
)
def test_nobody_waits_for_a_reader_that_died_in_the_middle_of_a_large_item(
    backend: str, tmp_path: Path
) -> None:
    text = """
@pipeline.producer
def blobs() -> Iterator[bytes]:
    for i in range(6):
        yield bytes([i]) * 3_000_000

@pipeline.consumer(workers=2)
def take(blob: bytes) -> tuple[int, int]:
    return blob[0], len(blob)
"""
    passings = tmp_path / "passings"
    ended = jobq(tmp_path, text, "-b", backend, JOBQ_FAULT=f"worker.half_recv:3=kill@{passings}")

    assert "was killed by SIGKILL" in ended.said
    assert sorted(ended.results) == [[i, 3_000_000] for i in range(6)]
    assert ended.code == 0


@fault(
    "B12",
    "items of tens or hundreds of megabytes",
    items="done; each travels alone, and is there two to four times: pickled, on its way, loaded",
    sees="nothing; where memory does not suffice, the job's `MemoryError` or a killed worker",
    exit=0,
)
def test_an_item_of_64_megabytes_travels_whole(tmp_path: Path) -> None:
    text = """
@pipeline.producer
def blobs() -> Iterator[bytes]:
    yield b"x" * (64 << 20)

@pipeline.consumer
def double(blob: bytes) -> bytes:
    return blob + blob[:1]

@pipeline.consumer
def weigh(blob: bytes) -> tuple[int, int]:
    return len(blob), blob.count(b"x")
"""
    ended = jobq(tmp_path, text)

    assert ended.results == [[(64 << 20) + 1] * 2]
    assert ended.code == 0


@fault(
    "B13",
    "an item holds a lock, a queue, a file, a generator or a local class",
    items="dead; sockets and connections are handed over (Linux)",
    sees="`… cannot be pickled: …` and what to do: `; define it at the top of a module`",
    exit=1,
)
@pytest.mark.parametrize(
    ("thing", "hint"),
    [
        (
            "multiprocessing.Lock()",
            "jobq.Lock, jobq.Semaphore and @pipeline.resource(scope='run') can be shared",
        ),
        (
            "multiprocessing.Queue()",
            "jobq.Lock, jobq.Semaphore and @pipeline.resource(scope='run') can be shared",
        ),
        (
            "open(os.devnull)",
            "what can't leave its process is opened by those who need it: @pipeline.resource",
        ),
        ("(i for i in itertools.count())", "give what it yields, one by one"),
        ("{'endless': (i for i in itertools.count())}", "give what it yields, one by one"),
        ("type('Local', (), {'__qualname__': 'f.<locals>.Local'})()", "define it at the top of a module"),
    ],
    ids=["lock", "queue", "file", "generator", "inner-generator", "local"],
)
def test_what_belongs_to_one_process_is_refused_with_a_hint(thing: str, hint: str, tmp_path: Path) -> None:
    text = f"""
import itertools, multiprocessing

@pipeline.producer
def things() -> Iterator[object]:
    yield 1
    yield {thing}
    yield 3

@pipeline.consumer
def take(thing: object) -> object:
    return thing
"""
    ended = jobq(tmp_path, text)

    assert hint in ended.said
    assert sorted(ended.results) == [1, 3]
    assert [letter["stage"] for letter in ended.dead] == ["things"]
    assert ended.code == 1


# --- frames --------------------------------------------------------------------------------------


@fault(
    "B14",
    "a producer is killed in the middle of a write",
    items="what it had given whole is finished; other producers go on",
    sees="`the producer numbers died` … `was killed by SIGKILL`",
    exit=1,
)
def test_half_a_frame_of_a_killed_producer_harms_no_other(backend: str, tmp_path: Path) -> None:
    text = """
@pipeline.producer
def blobs() -> Iterator[bytes]:
    for i in range(40):
        yield bytes([i]) * 50_000

@pipeline.producer
def others() -> Iterator[bytes]:
    until(lambda: Path("passings").exists())
    for i in range(100, 140):
        yield bytes([i]) * 50_000

@pipeline.consumer
def take(blob: bytes) -> int:
    assert len(blob) == 50_000
    return blob[0]
"""
    ended = jobq(tmp_path, text, "-b", backend, JOBQ_FAULT="producer.half_frame:4=kill@passings")

    lost = ended.dead[0]["stage"]
    first, other = (0, 100) if lost == "blobs" else (100, 0)
    given = sorted(i for i in ended.results if first <= i < first + 40)
    assert [i for i in sorted(ended.results) if i not in given] == list(range(other, other + 40))
    assert given == list(range(first, first + len(given)))
    assert [letter["error"] for letter in ended.dead] == ["WorkerLost"]
    assert "was killed by SIGKILL" in ended.said
    assert ended.code == 1


@fault(
    "B15",
    "garbage, or a truncated message, on a worker's channel",
    items="again",
    sees="`worker 1 of stage take (pid 4711) garbage on the channel: a job wrote into a descriptor that is"
    " not its own?`",
    exit=0,
)
@pytest.mark.parametrize("rubbish", ["print goes here", "jo"], ids=["garbage", "truncated"])
def test_a_worker_with_garbage_on_its_channel_is_replaced(rubbish: str, backend: str, tmp_path: Path) -> None:
    text = f"""
@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(20)

@pipeline.consumer(workers=2)
def take(i: int, job: Job) -> int:
    if i == 5 and job.delivery == 1:
        for fd in range(3, 64):
            try:
                if os.readlink(f"/proc/self/fd/{{fd}}").startswith("pipe:"):
                    os.write(fd, {rubbish.encode()!r})
            except OSError:
                pass  # it is for reading, or not there
        if {len(rubbish) < 8}:
            die()
    return i
"""
    ended = jobq(tmp_path, text, "-b", backend)

    assert ("garbage on the channel" if len(rubbish) > 8 else "was killed by SIGKILL") in ended.said
    assert sorted(ended.results) == list(range(20))
    assert ended.code == 0


SHOWS_ITS_PIPES = """
@pipeline.producer
def numbers() -> Iterator[int]:
    show()
    yield from range(40)

@pipeline.consumer(workers=3)
def take(i: int, job: Job) -> int:
    if i == 0 and job.delivery == 1:
        die()
    show()
    until(lambda: len({line.split()[0] for line in noted()}) >= 4)  # the others too, and a replacement
    return i

@pipeline.consumer
def end(i: int) -> int:
    show()
    return i

def show() -> None:
    for fd in os.listdir("/proc/self/fd"):
        try:
            name, flags = os.readlink(f"/proc/self/fd/{fd}"), open(f"/proc/self/fdinfo/{fd}").read()
        except OSError:
            continue
        if int(fd) > 2 and name.startswith("pipe:"):
            mode = int(flags.split("flags:")[1].split()[0], 8) & os.O_ACCMODE
            note(f"{os.getpid()} {name} {mode}")
"""


@fault(
    "B16",
    "unused ends of pipes stay open in whoever was forked meanwhile",
    items="done",
    sees="nothing: no worker has an end of another's channel, and the end of a pipe is nobody's only sign",
    exit=0,
)
def test_no_worker_holds_an_end_of_anothers_channel(backend: str, tmp_path: Path) -> None:
    ended = jobq(tmp_path, SHOWS_ITS_PIPES, "-b", backend)

    holders: dict[str, set[str]] = {}
    for pid, pipe, _ in map(str.split, set(ended.notes)):
        holders.setdefault(pipe, set()).add(pid)
    shared = {pipe for pipe, pids in holders.items() if len(pids) > 1}
    writers = {pipe for _, pipe, mode in map(str.split, ended.notes) if int(mode) == os.O_WRONLY}
    assert shared & writers == set(), "only the lifeline is shared, and no worker writes into it"
    assert len(shared) <= 1
    assert sorted(ended.results) == list(range(40))
    assert ended.code == 0


@fault(
    "B17",
    "two processes read from one pipe",
    items="done, once: of a job that comes back twice one copy leaves",
    sees="nothing",
    exit=0,
)
def test_a_channel_has_one_reader_though_a_job_comes_back_twice(backend: str, tmp_path: Path) -> None:
    text = """
@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(40)

@pipeline.consumer(workers=2)
def take(i: int) -> int:
    if i % 10 == 3:
        copy = os.fork()
        if copy:
            os.waitpid(copy, 0)
    return i

@pipeline.consumer
def second(i: int, job: Job) -> int:
    note(f"{i} {job.id}")
    return i
"""
    ended = jobq(tmp_path, text, "-b", backend)

    assert sorted(ended.results) == entered(ended) == list(range(40))
    assert ended.code == 0


@fault(
    "B18",
    "a worker is killed when half of a long answer is written",
    items="again: a frame counts whole or not at all",
    sees="`worker 1 of stage first (pid 4711) was killed by SIGKILL …`",
    exit=0,
)
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_half_an_answer_never_counts(size: int, backend: str, tmp_path: Path) -> None:
    text = f"""
@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(20)

@pipeline.consumer
def first(i: int) -> bytes:
    return bytes([i]) * {size}

@pipeline.consumer
def second(blob: bytes, job: Job) -> int:
    assert len(blob) == {size}
    note(f"{{blob[0]}} {{job.id}}")
    return blob[0]
"""
    ended = jobq(tmp_path, text, "-b", backend, JOBQ_FAULT="worker.half_frame:4=kill@passings")

    assert "was killed by SIGKILL" in ended.said
    assert sorted(ended.results) == entered(ended) == list(range(20))
    assert ended.code == 0


# --- producers -----------------------------------------------------------------------------------


@fault(
    "B19",
    "a producer raises half way",
    items="what it gave is done; other producers go on",
    sees="`producer broken stopped after 10 items: OSError: disk gone`, with the traceback",
    exit=1,
)
def test_what_a_producer_gave_before_it_raised_is_finished(tmp_path: Path) -> None:
    text = """
@pipeline.producer
def broken() -> Iterator[int]:
    yield from range(100, 110)
    raise OSError("disk gone")

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(20)

@pipeline.consumer
def take(i: int) -> int:
    return i
"""
    ended = jobq(tmp_path, text)

    assert "OSError: disk gone" in ended.said
    assert 'raise OSError("disk gone")' in ended.said
    assert sorted(ended.results) == [*range(20), *range(100, 110)]
    assert [(letter["stage"], letter["item"]) for letter in ended.dead] == [("broken", None)]
    assert ended.code == 1


@fault(
    "B20",
    "a producer's process dies between two items",
    items="what had arrived is done, and counted as given",
    sees="`… was killed by SIGKILL`",
    exit=1,
)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_what_a_producer_gave_before_it_died_is_finished(n: int, backend: str, tmp_path: Path) -> None:
    ended = jobq(tmp_path, TWO_STAGES, "-b", backend, JOBQ_FAULT=f"producer.before_frame:{n}=kill@passings")

    given = len(ended.results)
    assert sorted(ended.results) == entered(ended) == list(range(given))
    assert "was killed by SIGKILL" in ended.said
    assert [(letter["stage"], letter["error"]) for letter in ended.dead] == [("numbers", "WorkerLost")]
    assert ended.code == 1


@fault(
    "B21",
    "no thread can be started",
    items="cancelled, once a worker needs its thread; the calling process starts none",
    sees="`5 workers in a row ended before they finished a job; the last one could not go on: RuntimeError:"
    " can't start new thread; giving up, 16 jobs unfinished`; where only producers can't, exit 1",
    exit=3,
)
@pytest.mark.parametrize(("stage", "code"), [("first", 3), ("numbers", 1)])
def test_where_no_thread_can_be_started_the_run_gives_up_and_says_why(
    stage: str, code: int, tmp_path: Path
) -> None:
    text = f"""
import multiprocessing

def refuse(thread):
    if multiprocessing.current_process().name.startswith("{stage}"):
        raise RuntimeError("can't start new thread")
    start(thread)

start, threading.Thread.start = threading.Thread.start, refuse
{TWO_STAGES}"""
    ended = jobq(tmp_path, text)

    assert "could not go on: RuntimeError: can't start new thread" in ended.said
    assert ("giving up" in ended.said) == (code == 3)
    assert len(ended.results) < 20
    assert ended.code == code


SLOW_TO_START = """
@pipeline.producer
def fast() -> Iterator[int]:
    yield from range(20)
    note("fast has ended", "fast")

@pipeline.producer
def slow() -> Iterator[int]:
    until(lambda: noted("fast") and len(noted()) == 20)
    yield from range(100, 120)
    until(lambda: len(noted()) == 40)
    yield from range(120, 140)

@pipeline.resource
def ends_badly(fails: bool = False) -> Iterator[int]:
    yield 1
    if fails:
        die()

@pipeline.consumer(workers=4)
def take(i: int, ends_badly: int) -> int:
    note(i)
    return i
"""


@fault(
    "B22",
    "a queue is empty though more is to come, so `empty()` and `qsize()` mislead",
    items="done",
    sees="nothing: the end is that every producer has ended and nothing is queued or in flight",
    exit=0,
)
def test_a_pause_of_a_producer_is_not_taken_for_the_end(backend: str, tmp_path: Path) -> None:
    ended = jobq(tmp_path, SLOW_TO_START, "-b", backend)

    assert sorted(ended.results) == [*range(20), *range(100, 140)]
    assert ended.code == 0


@proves("B22")
def test_no_queue_is_asked_whether_it_is_empty() -> None:
    asked = [
        (file.name, node.lineno)
        for file in Path(package.__file__).parent.rglob("*.py")
        if file.name != "session.py"  # whose queues are between threads of one process
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(QUEUE_STATES)
    ]

    assert asked == []


@fault(
    "B23",
    "the wall clock jumps",
    items="done",
    sees="nothing: waits and time limits use the monotonic clock, and no semaphore's time-out is used",
    exit=0,
)
def test_nothing_waits_by_the_wall_clock(backend: str, tmp_path: Path) -> None:
    text = """
import itertools
jumps = itertools.cycle((0, 1e9, -1e9))
clock = time.time
time.time = lambda: clock() + next(jumps)

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(20)

@pipeline.consumer(max_retries=2, min_backoff=0.01, timeout=20)
def shaky(i: int, job: Job) -> int:
    if i % 5 == 0 and job.attempt == 1:
        raise ValueError
    return i

@pipeline.consumer(batch=7, batch_timeout=0.05, rate=1000)
def together(batch: list[int]) -> list[int]:
    return batch
"""
    began = time.monotonic()
    ended = jobq(tmp_path, text, "-b", backend)

    assert sorted(i for batch in ended.results for i in batch) == list(range(20))
    assert time.monotonic() - began < 15
    assert ended.code == 0


@fault(
    "B24",
    "a producer gives its first item when everybody else is through",
    items="done",
    sees="nothing: a run ends when every producer has",
    exit=0,
)
def test_a_run_waits_for_a_producer_that_has_given_nothing_yet(backend: str, tmp_path: Path) -> None:
    text = """
@pipeline.producer
def quick() -> Iterator[int]:
    yield 1

@pipeline.producer
def late() -> Iterator[int]:
    until(lambda: noted() == ["1"])
    yield 2

@pipeline.consumer
def take(i: int) -> int:
    note(i)
    return i
"""
    ended = jobq(tmp_path, text, "-b", backend)

    assert sorted(ended.results) == [1, 2]
    assert ended.code == 0


@fault(
    "B25",
    "ends of work are miscounted: two producers, one slow, and four workers that die at the end",
    items="done",
    sees="`worker 1 of stage take (pid 4711) was killed by SIGKILL`",
    exit=0,
)
def test_each_worker_hears_of_its_own_end(backend: str, tmp_path: Path) -> None:
    ended = jobq(tmp_path, SLOW_TO_START, "-b", backend, "-p", "fails=true")

    assert sorted(ended.results) == [*range(20), *range(100, 140)]
    assert ended.code == 0


@fault(
    "B26",
    "a worker has more to say than a pipe holds when it is told to end",
    items="done",
    sees="nothing: the calling process always reads",
    exit=0,
)
def test_results_are_read_while_workers_end(backend: str, tmp_path: Path) -> None:
    text = """
@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(8)

@pipeline.consumer(workers=2)
def long(i: int) -> str:
    return str(i) * 2_000_000
"""
    ended = jobq(tmp_path, text, "-b", backend)

    assert sorted((text[0], len(text)) for text in ended.results) == [(str(i), 2_000_000) for i in range(8)]
    assert ended.code == 0


@fault(
    "B27",
    "a worker is killed between its work and its answer, or right after the answer",
    items="again; what it gave enters the next stage once, since answer and outputs are one frame",
    sees="`worker 1 of stage first (pid 4711) was killed by SIGKILL …`",
    exit=0,
)
@pytest.mark.parametrize("point", ["worker.after_work:7", "worker.before_frame:5", "worker.after_frame:5"])
def test_what_a_worker_gave_counts_with_its_answer_or_not_at_all(
    point: str, backend: str, tmp_path: Path
) -> None:
    ended = jobq(tmp_path, TWO_STAGES, "-b", backend, JOBQ_FAULT=f"{point}=kill@passings")

    assert "was killed by SIGKILL" in ended.said
    assert sorted(ended.results) == entered(ended) == list(range(20))
    assert ended.code == 0


@fault(
    "B28",
    "a signal handler gives items, or signals come at any instant",
    items="done",
    sees="nothing: jobq's own handlers set a flag and write a byte",
)
def test_a_signal_handler_may_submit_items() -> None:
    pipeline = Pipeline("signals")
    futures: list[Future[Any]] = []

    @pipeline.consumer
    def double(i: int) -> int:
        return 2 * i

    def give(*_: object) -> None:
        if len(futures) < 300:
            futures.append(run.submit(len(futures)))

    with pipeline.open() as run:
        before = signal.signal(signal.SIGUSR1, give)
        try:
            while len(futures) < 300:
                os.kill(os.getpid(), signal.SIGUSR1)
                run.submit(0).result(timeout=20)
            run.join(timeout=20)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert [future.result() for future in futures] == [2 * i for i in range(300)]


@fault(
    "B29",
    "items overtake each other, and more so after a death",
    items="done; `ordered=True` gives outputs in the order of the inputs",
    sees="`worker 2 of stage take (pid 4711) was killed by SIGKILL …`",
    exit=0,
)
def test_an_ordered_stage_keeps_its_order_over_deaths(backend: str, tmp_path: Path) -> None:
    text = """
@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(60)

@pipeline.consumer(workers=3, ordered=True)
def take(i: int, job: Job) -> int:
    if i % 20 == 7 and job.delivery == 1:
        die()
    return i
"""
    ended = jobq(tmp_path, text, "-b", backend)

    assert "was killed by SIGKILL" in ended.said
    assert ended.results == list(range(60))
    assert ended.code == 0


@fault(
    "B30",
    "a producer that never ends before a slow consumer",
    items="at most `queue_size` (1000) wait; the producer waits at its yield",
    sees="nothing; after Ctrl-C those that wait are finished",
    exit=130,
)
def test_a_producer_without_end_fills_no_memory(backend: str, tmp_path: Path) -> None:
    text = """
import itertools

@pipeline.producer
def numbers() -> Iterator[int]:
    for i in itertools.count():
        note(i, "given")
        yield i

@pipeline.consumer
def take(i: int) -> int:
    if i == 0:
        until(settled)
        os.kill(DRIVER, signal.SIGINT)
    return i

DRIVER = os.getpid()

def settled() -> bool:
    before = len(noted("given"))
    time.sleep(0.2)  # time enough for a producer that nobody stops to give thousands
    return before > 0 and len(noted("given")) == before
"""
    ended = jobq(tmp_path, text, "-b", backend)

    given = len((tmp_path / "given").read_text().split())
    assert given <= 1000 + 1 + 1  # those that wait, the one in hand, the one at the yield
    assert sorted(ended.results) == list(range(len(ended.results)))
    assert given - 1 <= len(ended.results) <= given
    assert ended.code == 130


# --- faults that came up while these were shown --------------------------------------------------


HANGS_WHEN_LOADED = """
def hang():
    note("loads")
    time.sleep(1000)

class Slow:
    def __reduce__(self):
        return hang, ()

@pipeline.producer
def things() -> Iterator[object]:
    yield from (1, Slow(), 3)
"""


@fault(
    "B31",
    "loading an item takes for ever",
    items="with a `timeout`, again, alone; dead after `max_deliveries`. Else it is waited for, as for a job",
    sees="`item 1 of stage take killed its worker 2 times and is given up`",
    exit=1,
)
def test_a_time_limit_holds_for_loading_too(backend: str, tmp_path: Path) -> None:
    text = f"""{HANGS_WHEN_LOADED}
@pipeline.consumer(timeout=0.3, max_deliveries=2)
def take(thing: object) -> object:
    return thing
"""
    ended = jobq(tmp_path, text, "-b", backend)

    assert "item 1 of stage take killed its worker 2 times and is given up" in ended.said
    assert sorted(ended.results) == [1, 3]
    assert ["item_pickle" in letter for letter in ended.dead] == [True]
    assert ended.code == 1


@proves("B31")
def test_what_a_stopped_worker_was_loading_is_loaded_by_nobody_else(tmp_path: Path) -> None:
    text = f"""{HANGS_WHEN_LOADED}
    until(lambda: noted() == ["loads"])
    os.kill(DRIVER, signal.SIGTERM)

DRIVER = os.getpid()

@pipeline.consumer
def take(thing: object) -> object:
    return thing
"""
    ended = jobq(tmp_path, text, "--shutdown-timeout", "0.2")

    assert ended.notes == ["loads"]
    assert ended.code == 143
    assert {letter["status"] for letter in ended.dead} == {"cancelled"}
    assert any("item_pickle" in letter for letter in ended.dead)


@fault(
    "B32",
    "an answer can't be written: no memory for it",
    items="again",
    sees="the traceback, and `worker 1 of stage first (pid 4711) exited with code 1 in the middle of"
    " its work`",
    exit=0,
)
def test_a_worker_that_cant_answer_ends_and_its_jobs_run_again(backend: str, tmp_path: Path) -> None:
    ended = jobq(tmp_path, TWO_STAGES, "-b", backend, JOBQ_FAULT="worker.before_frame:6=ENOMEM@passings")

    assert "Cannot allocate memory" in ended.said
    assert "exited with code 1 in the middle of its work" in ended.said
    assert sorted(ended.results) == entered(ended) == list(range(20))
    assert ended.code == 0


@fault(
    "B33",
    "an item is not of the type that its taker declares",
    items="dead, never retried",
    sees="`item 1 failed in stage take: PayloadError: take() takes Page: …`, with the field",
    exit=1,
)
def test_an_item_of_the_wrong_type_is_named_with_its_field(tmp_path: Path) -> None:
    text = """
from dataclasses import dataclass

@dataclass
class Page:
    url: str
    size: int

@pipeline.producer
def pages() -> Iterator[Page]:
    yield Page("a", 1)
    yield Page("b", "large")
    yield Page("c", 3)

@pipeline.consumer(max_retries=5)
def take(page: Page) -> str:
    note(page.url)
    return page.url
"""
    ended = jobq(tmp_path, text)

    assert "item 1 failed in stage take: PayloadError: take() takes Page: " in ended.said
    assert "size" in ended.dead[0]["message"]
    assert sorted(ended.results) == sorted(ended.notes) == ["a", "c"]
    assert ended.code == 1


@fault(
    "B34",
    "a line of `--input` is no JSON, cut off, or not of the type",
    items="dead, with the number of the line; all others done",
    sees="`PayloadError: input.jsonl, line 2: Invalid JSON: …`",
    exit=1,
)
def test_a_bad_line_of_input_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "input.jsonl").write_bytes(b'1\n{"cut": \n\n"text"\n\xff\xfe\n5')
    text = """
@pipeline.consumer
def take(i: int) -> int:
    return i
"""
    ended = jobq(tmp_path, text, "--input", "input.jsonl")

    assert sorted(ended.results) == [1, 5]
    assert [number for number in range(1, 7) if f"input.jsonl, line {number}: " in ended.said] == [2, 4, 5]
    assert len(ended.dead) == 3
    assert ended.code == 1


@fault(
    "B35",
    "a result has no JSON form, or never ends, and is to be written",
    items="the job that gave it is dead",
    sees="`PayloadError: a result of take() has no JSON form: …`",
    exit=1,
)
def test_a_result_without_a_json_form_is_a_dead_letter(tmp_path: Path) -> None:
    text = """
import itertools

@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(3)

@pipeline.consumer
def take(i: int) -> object:
    return (i, object(), itertools.count())[i]
"""
    ended = jobq(tmp_path, text)

    assert ended.said.count("failed in stage take: PayloadError: a result of take() has no JSON form: ") == 2
    assert ended.results == [0]
    assert sorted(letter["item"] for letter in ended.dead) == [1, 2]
    assert ended.code == 1


@fault(
    "B36",
    "`key` raises, or gives something that is no text",
    items="dead at the stage that has the key; the stage that gave it is done",
    sees="`item 1 failed in stage take: PayloadError: … key raised KeyError: 'url'`",
    exit=1,
)
def test_a_key_that_cant_be_had_is_a_dead_letter_of_its_stage(tmp_path: Path) -> None:
    text = """
@pipeline.producer
def pages() -> Iterator[dict[str, Any]]:
    yield from ({"url": "a"}, {}, {"url": 3}, {"url": "b"})

@pipeline.consumer(key=lambda page: page["url"])
def take(page: dict[str, Any]) -> Any:
    return page["url"]
"""
    ended = jobq(tmp_path, text)

    assert "key raised KeyError: 'url'" in ended.said
    assert "key gave a int, not a str" in ended.said
    assert sorted(ended.results) == ["a", "b"]
    assert {letter["stage"] for letter in ended.dead} == {"take"}
    assert ended.code == 1


@fault(
    "B37",
    "a job that wrote into its channel has ended before that is seen",
    items="again: all that its worker had not answered, each alone, so that the right one is charged",
    sees="`item 5 of stage take killed its worker 3 times and is given up`",
    exit=1,
)
def test_a_job_that_always_spoils_its_channel_is_the_one_that_is_given_up(
    backend: str, tmp_path: Path
) -> None:
    text = """
@pipeline.producer
def numbers() -> Iterator[int]:
    yield from range(40)

@pipeline.consumer(workers=2)
def take(i: int) -> int:
    if i == 5:
        for fd in range(3, 64):
            try:
                if os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
                    os.write(fd, b"print goes here")
            except OSError:
                pass  # it is for reading, or not there
    return i
"""
    ended = jobq(tmp_path, text, "-b", backend)

    assert "item 5 of stage take killed its worker 3 times and is given up" in ended.said
    assert sorted(ended.results) == [i for i in range(40) if i != 5]
    assert [letter["item"] for letter in ended.dead] == [5]
    assert ended.code == 1


out_of_reach(
    "B38",
    "an item that kills whoever loads it still waits, unseen, when the run is stopped",
    items="cancelled, like all that wait",
    sees="the command may be killed while it writes the letters",
    why="a letter holds its item in JSON where it has that form, and to see that, the item is loaded; in the"
    " calling process, when every worker is gone. Only what a worker was loading is left pickled (B31).",
)
