"""
Runs at full speed while somebody kills a random process of theirs again and again; a script, outside CI.

    python tests/soak.py --seconds 600 --backend joinable

    soak (this process): kills, samples, judges ──> driver: one run after another, in one process
                                                     └─> producers and workers, which write down what they do

What a round (one run) did is judged by the files that its jobs wrote. A producer that is killed gives no more
and is one dead letter, so a round has several, and rounds follow each other; nothing else may be dead. The
process of a run-scoped resource is killed in rounds of its own: by contract that is the end of a run, exit 3.
Ends with 0 if everything held, else with 1 and what did not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from jobq import Job, Pipeline, Shard

PRODUCERS = 3
STAGES = ("parse", "store", "spread")
#: Of a hundred kills so many hit a producer, and so many a process that is neither producer nor worker.
PRODUCER_SHARE, OTHER_SHARE = 5, 2
#: Memory may grow by so much between the first and the last fifth of the rounds' ends.
GROWTH_BYTES = 4 << 20

# --- what is run ---------------------------------------------------------------------------------

pipeline = Pipeline("soak")


@dataclass
class Item:
    """A number that no other item has: its producer's, and which of its items it is."""

    number: int
    text: str


class Book:
    """What a stage did, in the order of doing: number and delivery of each job."""

    def __init__(self, folder: str, stage: str) -> None:
        (Path(folder) / f"{stage}.{os.getpid()}").touch()  # so that it is known whom a kill hits
        self._fd = os.open(Path(folder) / stage, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def add(self, number: int, delivery: int) -> None:
        os.write(self._fd, array("Q", (number, delivery)).tobytes())


def producer_number(index: int, n: int) -> int:
    return index << 40 | n


@pipeline.producer(workers=PRODUCERS)
def numbers(shard: Shard, folder: str, until: float) -> Iterator[Item]:
    (Path(folder) / f"numbers.{os.getpid()}").touch()
    for n in itertools.count():
        if time.monotonic() >= until:
            break
        yield Item(producer_number(shard.index, n), "x" * (n % 50))
    (Path(folder) / f"ended.{shard.index}").touch()


@pipeline.resource
def parse_book(folder: str) -> Book:
    return Book(folder, "parse")


@pipeline.resource
def store_book(folder: str) -> Book:
    return Book(folder, "store")


@pipeline.resource
def spread_book(folder: str) -> Book:
    return Book(folder, "spread")


@pipeline.consumer(workers=3, ordered=True, max_deliveries=1000, max_retries=3, min_backoff=0.001)
def parse(item: Item, job: Job, parse_book: Book) -> Item:
    if job.attempt == 1 and item.number % 997 == 0:
        raise ValueError("the first attempt of one in a thousand")
    parse_book.add(item.number, job.delivery)
    return item


@pipeline.consumer(source=parse, max_deliveries=1000)
def store(item: Item, job: Job, store_book: Book) -> None:
    store_book.add(item.number, job.delivery)


@pipeline.consumer(source=parse, workers=2, max_deliveries=1000)
def spread(item: Item, job: Job, spread_book: Book) -> None:
    spread_book.add(item.number, job.delivery)


kept = Pipeline("kept")


@kept.producer
def endless() -> Iterator[int]:
    yield from itertools.count()


@kept.resource(scope="run")
def shared(folder: str) -> Iterator[dict[str, int]]:
    (Path(folder) / f"keeper.{os.getpid()}").touch()
    yield {}


@kept.consumer(workers=2)
def use(item: int, shared: dict[str, int]) -> None:
    shared["last"] = item


def drive(folder: Path, options: argparse.Namespace) -> None:
    """Run round after round; tell each one's report, and what this process has after it."""
    end = time.monotonic() + options.seconds
    for turn in itertools.count():
        left = end - time.monotonic()
        if left <= 0:
            return
        place = folder / str(turn)
        place.mkdir()
        report = pipeline.run(
            folder=str(place),
            until=time.monotonic() + min(options.round, left),
            backend=options.backend,
            check=False,
        )
        told = {"folder": str(place), "report": report.model_dump(mode="json"), "after": state(os.getpid())}
        print(json.dumps(told), flush=True)


# --- who watches ---------------------------------------------------------------------------------


def state(pid: int) -> dict[str, int]:
    """Return what a process has: bytes of memory, descriptors, threads, children."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "rss": int(status["VmRSS"].split()[0]) << 10,
        "fds": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208  # names only
        "threads": int(status["Threads"]),
        "children": sum(parent == pid for parent in parents().values()),
    }


def parents() -> dict[int, int]:
    """Return each process's parent."""
    found = {}
    for path in (process / "stat" for process in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            text = path.read_text()
            if text.rpartition(")")[2].split()[0] != "Z":
                found[int(path.parent.name)] = int(text.rpartition(")")[2].split()[1])
    return found


def descendants(pid: int) -> list[int]:
    family, tree = {pid}, parents()
    while more := {child for child, parent in tree.items() if parent in family} - family:
        family |= more
    return sorted(family - {pid})


def left_of(mark: str) -> list[int]:
    """Return the processes that have *mark* in their environment, some time after they should be gone."""
    deadline = time.monotonic() + 2
    while True:
        found = []
        for path in (process / "environ" for process in Path("/proc").glob("[0-9]*")):
            with contextlib.suppress(OSError):
                if f"SOAK={mark}".encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        if not found or time.monotonic() >= deadline:
            return found
        time.sleep(0.05)


@dataclass
class Watch:
    """What was done to the rounds, and what they did."""

    options: argparse.Namespace
    problems: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    items: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    repeats: int = 0
    samples: list[dict[str, int]] = field(default_factory=list)
    ends: list[dict[str, int]] = field(default_factory=list)

    def kill_one(self, driver: int, folder: Path, chance: random.Random) -> None:
        """Kill a process of the round in progress."""
        rounds = [path for path in folder.iterdir() if path.is_dir()]
        place = max(rounds, key=lambda path: int(path.name), default=folder)
        kinds: dict[str, list[int]] = {"producer": [], "worker": [], "other": []}
        roles = {int(path.suffix[1:]): path.stem for path in place.glob("*.*") if path.stem != "ended"}
        for pid in descendants(driver):
            role = roles.get(pid)
            kinds["producer" if role == "numbers" else "other" if role is None else "worker"].append(pid)
        dice = chance.randrange(100)
        kind = "producer" if dice < PRODUCER_SHARE else "other" if dice >= 100 - OTHER_SHARE else "worker"
        if kinds[kind]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(kinds[kind]), signal.SIGKILL)
                self.kills[kind] += 1
                with (place / f"killed-{kind}").open("a") as file:
                    file.write("x")

    def judge(self, told: dict[str, Any]) -> None:
        """Hold a round's report against what its jobs wrote down."""
        place, report = Path(told["folder"]), told["report"]
        self.ends.append(told["after"])
        stages, dead = report["stages"], report["stages"]["numbers"]["dead"]
        given = stages["numbers"]["done"]
        self.items += given
        for name, stage in stages.items():
            self.counts.update({what: stage[what] for what in ("retried", "redelivered", "worker_restarts")})
            settled = stage["done"] + stage["filtered"] + stage["dead"] + stage["cancelled"]
            self.claim(stage["received"] == settled, f"{place.name}: {name} doesn't balance: {stage}")
            lost = stage["dead"] * (name != "numbers") + stage["cancelled"]
            self.claim(not lost, f"{place.name}: {name} has dead or cancelled jobs: {report['dead'][:3]}")
        for edge in report["edges"]:
            self.claim(edge["emitted"] == edge["received"], f"{place.name}: {edge}")
        unended = PRODUCERS - len(list(place.glob("ended.*")))
        killed = place / "killed-producer"
        kills = killed.stat().st_size if killed.exists() else 0
        self.claim(
            unended <= dead <= kills,
            f"{place.name}: {unended} producers did not end, {dead} are dead, {kills} were killed",
        )
        self.counts["producers dead"] += dead
        for name in STAGES:
            self._judge_stage(place, name, given)
        shutil.rmtree(place)

    def _judge_stage(self, place: Path, name: str, given: int) -> None:
        lines = array("Q")
        if (place / name).exists():
            lines.frombytes((place / name).read_bytes())
        done = lines[::2]
        distinct = dict.fromkeys(done)  # in order of the first time
        self.repeats += len(done) - len(distinct)
        self.claim(len(distinct) == given, f"{place.name}: {name} did {len(distinct)} items of {given}")
        following = [0] * PRODUCERS
        in_order = True
        for number in distinct if name == "store" else sorted(distinct):
            index, n = number >> 40, number & (1 << 40) - 1
            in_order &= n == following[index]
            following[index] = n + 1
        self.claim(in_order, f"{place.name}: {name} has gaps, or what parse gave it was not in order")

    def claim(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.problems.append(otherwise)

    def judge_the_end(self) -> None:
        """What the driver has must be the same after the first rounds and after the last."""
        self.claim(bool(self.ends), "no round came to its end")
        fifth = max(1, len(self.ends) // 5)
        first, last = self.ends[: 2 * fifth][-fifth:], self.ends[-fifth:]
        for what in ("fds", "threads", "children"):
            values = [end[what] for end in (*first, *last)]
            self.claim(len(set(values)) <= 1, f"{what} after the rounds are not the same: {values}")
        rss = [statistics.median(end["rss"] for end in ends) for ends in (first, last) if ends]
        if len(self.ends) >= 10:  # before, the interpreter itself still grows
            self.claim(rss[1] - rss[0] <= GROWTH_BYTES, f"memory grew from {rss[0]:,} to {rss[1]:,} bytes")

    def judge_what_is_left(self, mark: str) -> None:
        left = left_of(mark)
        self.claim(not left, f"processes are left: {left}")
        for pid in left:
            os.kill(pid, signal.SIGKILL)

    def table(self, seconds: float) -> str:
        kills = ", ".join(f"{count:,} {kind}s" for kind, count in sorted(self.kills.items()))
        rows = [
            ("backend", f"{self.options.backend}, {seconds:.0f} s, {len(self.ends)} rounds"),
            ("items", f"{self.items:,} ({self.items / seconds:,.0f}/s, three stages each)"),
            ("kills", f"{sum(self.kills.values()):,}: {kills}"),
            *((what, f"{count:,}") for what, count in self.counts.items()),
            ("done again", f"{self.repeats:,} calls, after deaths"),
        ]
        for what in ("rss", "fds", "threads", "children"):
            values = [end[what] for end in self.ends] or [0]
            most = max((sample[what] for sample in self.samples), default=0)
            rows.append((f"{what} of driver", f"{values[0]:,} first, {values[-1]:,} last, {most:,} most"))
        return "\n".join(f"{name:<18}{value}" for name, value in rows)


def soak(options: argparse.Namespace, folder: Path) -> Watch:
    watch, chance = Watch(options), random.Random(options.seed)
    began = time.monotonic()
    command = [sys.executable, __file__, "--drive", str(folder), "--seconds", str(options.seconds),
               "--round", str(options.round), "--backend", options.backend]  # fmt: skip
    mark = uuid.uuid4().hex
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"SOAK": mark}) as driver:
        assert driver.stdout is not None
        os.set_blocking(driver.stdout.fileno(), False)
        next_kill = next_sample = began
        pending = b""
        # A round lasts until its last item is done; a minute more, and something hangs.
        while (now := time.monotonic()) < began + options.seconds + 60:
            if now >= next_kill:
                next_kill = now + options.kill_every
                watch.kill_one(driver.pid, folder, chance)
            if now >= next_sample:
                next_sample = now + 1
                with contextlib.suppress(OSError, KeyError):  # it has just ended
                    watch.samples.append(state(driver.pid))
            *lines, pending = (pending + _read(driver.stdout)).split(b"\n")
            for line in lines:
                watch.judge(json.loads(line))
            if driver.poll() is not None and not lines:
                break
            time.sleep(max(0.0, min(next_kill, next_sample) - time.monotonic()))
        watch.claim(driver.poll() == 0, f"the driver ended with {driver.poll()} (None: it hung)")
        driver.kill()
    watch.judge_what_is_left(mark)
    return watch


def _read(stream: IO[bytes]) -> bytes:
    try:
        return os.read(stream.fileno(), 1 << 20)
    except BlockingIOError:
        return b""


def kill_keepers(watch: Watch, folder: Path, rounds: int) -> None:
    """Kill the process of a run-scoped resource, in runs that must end with 3."""
    for turn in range(rounds):
        place = folder / f"keeper-{turn}"
        place.mkdir()
        target = f"{Path(__file__).resolve()}:kept"
        command = [sys.executable, "-m", "jobq.cli", "run", target, "-b", watch.options.backend, "-q",
                   "-p", f"folder={place}", "--dead-letters", str(place / "dead")]  # fmt: skip
        mark = uuid.uuid4().hex
        with subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"SOAK": mark}) as run:
            deadline = time.monotonic() + 30
            while not (found := list(place.glob("keeper.*"))) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(random.Random(turn).random() / 5)
            if found:
                os.kill(int(found[0].suffix[1:]), signal.SIGKILL)
                watch.kills["keeper"] += 1
            try:
                _, said = run.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                run.kill()
                said = b"it hung"
        watch.judge_what_is_left(mark)
        words = said.decode(errors="replace")
        watch.claim(run.returncode == 3, f"a run without its keeper ended with {run.returncode}: {words}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill processes of runs at full speed, and judge the runs.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--backend", default="joinable", choices=["joinable", "sentinel", "pipe"])
    parser.add_argument("--round", type=float, default=10.0, help="seconds that one run lasts")
    parser.add_argument("--kill-every", type=float, default=0.2, help="seconds")
    parser.add_argument("--keepers", type=int, default=5, help="runs whose resource process is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive is not None:
        drive(options.drive, options)
        return 0
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        began = time.monotonic()
        watch = soak(options, Path(folder))
        seconds = time.monotonic() - began
        kill_keepers(watch, Path(folder), options.keepers)
    watch.judge_the_end()
    print(watch.table(seconds))
    for problem in watch.problems:
        print("NOT RIGHT:", problem)
    return 1 if watch.problems else 0


if __name__ == "__main__":
    sys.exit(main())
