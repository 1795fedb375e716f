"""Dead letters: what is in their file, what the command line shows of it, and how they are run again."""

from __future__ import annotations

import base64
import collections
import datetime as dt
import decimal
import enum
import json
import os
import pickle
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import click
import pytest
from pydantic import AfterValidator, BaseModel, Field
from typing_extensions import TypedDict

from jobq.cli.dead import replay
from jobq.cli.run import run
from jobq.failure import JsonForm, same
from jobq.replay import Letter, NoLetter, read_line
from tests.test_cli import JOBQ, ended, interpreter_left_as_it_was, jobq

__all__ = ["interpreter_left_as_it_was"]

pytestmark = pytest.mark.slow

#: Each job writes down what it was given; it fails while there is a file "broken" and its item says so.
FARM = """
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from jobq import Job, Pipeline

pipeline = Pipeline("farm")

def note(name: str, item: object) -> None:
    with open(name, "a") as file:
        file.write(repr(item) + "\\n")

def is_broken() -> bool:
    return Path("broken").exists()

@dataclass
class Egg:
    number: int
    marks: tuple[str, ...] = ()

@pipeline.producer
def hens(count: int = 4) -> Iterator[Egg]:
    for number in range(count):
        yield Egg(number, ("a", "b"))
    if is_broken():
        raise OSError("the hens are gone")

@pipeline.consumer(workers=2, max_retries=1, min_backoff=0)
def cook(egg: Egg, job: Job) -> str | None:
    note("cooked", egg)
    egg.marks = ("touched",)
    if is_broken() and egg.number % 2:
        raise ValueError(f"egg {egg.number} is\\nrotten")
    return f"meal {egg.number}" if egg.number < 100 else None

@pipeline.consumer
def eat(meal: str) -> str:
    note("eaten", meal)
    if is_broken() and meal.endswith("0"):
        raise RuntimeError(meal)
    return meal.upper()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "farm.py").write_text(FARM)
    for name in [name for name in os.environ if name.startswith("JOBQ_")]:
        monkeypatch.delenv(name)
    return tmp_path


def letter(**changes: Any) -> dict[str, Any]:
    return {
        "run": "r1", "pipeline": "farm", "target": "farm.py", "stage": "cook", "job": 7, "key": None,
        "item": {"number": 1, "marks": []}, "item_type": "Egg", "status": "dead", "attempts": 2,
        "deliveries": 1, "error": "ValueError", "message": "rotten", "traceback": "Traceback…\n",
        "time": "2024-01-01T00:00:00+00:00", **changes,
    }  # fmt: skip


def written(*letters: Any, name: str = "some.jsonl") -> str:
    """Write a file, each of *letters* a line: as it is if it is bytes."""
    lines = (one if isinstance(one, bytes) else json.dumps(one).encode() for one in letters)
    Path(name).write_bytes(b"".join(line + b"\n" for line in lines))
    return name


def pickled(item: Any) -> dict[str, Any]:
    return letter(item=None, item_pickle=base64.b64encode(pickle.dumps(item)).decode())


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("struck",)


def of_a_broken_run(*options: str) -> Path:
    """Run the farm while it is broken, and mend it; return the file of its dead letters."""
    Path("broken").touch()
    assert ended("run", "farm.py", "-q", "--dead-letters", "dead.jsonl", *options).returncode == 1
    Path("broken").unlink()
    return Path("dead.jsonl")


def lines_of(name: str | Path) -> list[str]:
    return sorted(Path(name).read_text().splitlines()) if Path(name).exists() else []


def letters_in(file: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


# ── what a run writes down ───────────────────────────────────────────────────


class Kind(enum.Enum):
    SMALL = "small"


class Number(enum.IntEnum):
    ONE = 1


class Model(BaseModel):
    x: float = 0
    counts: dict[int, str] = {}
    places: tuple[int, ...] = ()
    raw: bytes = b""


class Wider(Model):
    more: int = 1


class Renamed(BaseModel):
    a: int = Field(alias="A")


class Hidden(BaseModel):
    a: int = Field(default=1, exclude=True)


@dataclass
class Tree:
    name: str
    twigs: list[Tree] = field(default_factory=list)
    height: int = field(init=False, default=3)


@dataclass(frozen=True, slots=True)
class Day:
    date: dt.date
    kind: Kind = Kind.SMALL


class Row(TypedDict, total=False):
    a: int
    b: bytes


class Pair(NamedTuple):
    a: int
    b: str


def grown() -> Tree:
    tree = Tree("oak")
    tree.height = 9
    return tree


MOMENT = dt.datetime(2024, 1, 1, 1, 2, 3, 4, tzinfo=dt.UTC)

READABLE: list[tuple[Any, Any]] = [
    (int, 2**70), (float, 1), (float, float("nan")), (float, float("-inf")), (str, "a\n\u2028\x1b"),
    (bytes, b"abc"), (bool, True), (Any, {"a": [1, 1.5, None, True]}), (object, {"a": 1}),
    (dt.datetime, MOMENT), (dt.timedelta, dt.timedelta(days=-1, microseconds=3)), (dt.date, MOMENT.date()),
    (decimal.Decimal, decimal.Decimal("1.10")), (uuid.UUID, uuid.UUID(int=7)), (Path, Path("a/b")),
    (Kind, Kind.SMALL), (Number, Number.ONE), (set[int], {1, 2}), (frozenset[str], frozenset("ab")),
    (tuple[int, str], (1, "a")), (dict[int, str], {1: "a"}), (dict[dt.date, int], {MOMENT.date(): 1}),
    (collections.defaultdict[str, int], collections.defaultdict(int, a=1)),
    (Model, Model(x=1.5, counts={1: "a"}, places=(1, 2))), (Renamed, Renamed(A=1)),
    (Tree, Tree("a", [Tree("b")])), (Day, Day(MOMENT.date())), (Row, {"a": 1, "b": b"x"}),
    (Pair, Pair(1, "x")), (int | str, "5"),
    (Model | Tree, Tree("a")), (dt.datetime | str, MOMENT),
]  # fmt: skip

#: What would come back as something else, or not at all.
UNREADABLE: list[tuple[Any, Any]] = [
    (float, 2**60 + 1), (str, "\udc80"), (bytes, b"\xff"), (int, 10**5000), (Any, (1, 2)), (Any, {1: 2}),
    (Any, {"a": MOMENT}), (Any, Number.ONE), (Any, [Number.ONE]), (Any, float("nan")), (Any, b"x"),
    (object, (1,)), (dict[tuple[int, int], str], {(1, 2): "a"}), (Model, Model(x=float("nan"))),
    (Model, Wider()), (Model, Model(raw=b"\xff")), (Model, {"x": 1}), (Hidden, Hidden(a=5)), (Tree, grown()),
    (dt.datetime | str, "2024-01-01T00:00:00"), (Annotated[str, AfterValidator(str.lower)], "ABC"),
    (list[int], (1, 2)), (Exception, ValueError("x")), (Model, Model.model_construct(x="no")),
    (list, json.loads("[" * 230 + "]" * 230)),
]  # fmt: skip


def named(value: Any) -> str:
    """Return the id of a parameter: the same in every process, whatever order its sets have there."""
    return ascii(sorted(value) if isinstance(value, set | frozenset) else value)[:30]


@pytest.mark.parametrize(("kind", "item"), READABLE, ids=named)
def test_what_has_a_json_form_comes_back_from_it_as_it_was(kind: Any, item: Any) -> None:
    text = JsonForm(kind).text(item)

    assert text is not None
    assert same(JsonForm(kind).item(json.dumps(json.loads(text))), item)


@pytest.mark.parametrize(
    ("kind", "item"), UNREADABLE, ids=[f"{kind}-{type(item).__name__}" for kind, item in UNREADABLE]
)
def test_what_would_not_come_back_as_it_was_has_no_json_form(kind: Any, item: Any) -> None:
    assert JsonForm(kind).text(item) is None


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (1, 1.0, True), (1, True, False), ([1], [True], False), ({1}, {1.0}, False), ("a", Kind, False),
        ({"a": (1,)}, {"a": [1]}, False), (Model(x=1), Model(x=1.0), True), (Model(), Wider(), False),
        (float("nan"), float("nan"), True), (collections.deque([1]), collections.deque([True]), False),
    ],
)  # fmt: skip
def test_things_are_the_same_if_they_are_to_the_bottom(one: Any, other: Any, alike: bool) -> None:
    assert same(one, other) is alike


def test_a_letter_holds_the_item_as_it_came_and_not_as_its_job_left_it() -> None:
    letters = letters_in(of_a_broken_run())

    cooked = {one["item"]["number"]: one for one in letters if one["stage"] == "cook"}
    assert set(cooked) == {1, 3}
    assert cooked[1]["item"]["marks"] == ["a", "b"]
    assert (cooked[1]["item_type"], cooked[1]["attempts"], cooked[1]["status"]) == ("Egg", 2, "dead")
    assert set(cooked[1]) == set(letter())
    assert "egg 1 is\nrotten" in cooked[1]["traceback"]
    assert [one["item"] for one in letters if one["stage"] == "eat"] == ["meal 0"]


def test_lanes_and_batches_keep_the_item_as_it_came(here: Path) -> None:
    (here / "lanes.py").write_text(
        "from collections.abc import Iterator\n"
        "from jobq import Pipeline\n"
        "pipeline = Pipeline('lanes')\n"
        "@pipeline.producer\n"
        "def rows() -> Iterator[dict[str, int]]:\n    yield {'a': 1}\n    yield {'a': 2}\n"
        "@pipeline.consumer(source='rows', concurrency=2)\n"
        "def one(row: dict[str, int]) -> None:\n    row.clear(); raise ValueError\n"
        "@pipeline.consumer(source='rows', batch=2)\n"
        "def many(rows: list[dict[str, int]]) -> None:\n"
        "    [row.clear() for row in rows]; rows.clear(); raise ValueError\n"
    )

    assert ended("run", "lanes.py", "-q", "--dead-letters", "dead.jsonl").returncode == 1

    kept = sorted((one["stage"], one["item"]["a"]) for one in letters_in("dead.jsonl"))
    assert kept == [("many", 1), ("many", 2), ("one", 1), ("one", 2)]


def test_an_item_whose_job_took_too_long_has_its_json_form_and_type(here: Path) -> None:
    (here / "slow.py").write_text(
        "import time\nfrom collections.abc import Iterator\n"
        "from jobq import Pipeline\n"
        "pipeline = Pipeline('slow')\n"
        "@pipeline.producer\ndef rows() -> Iterator[dict[str, int]]:\n    yield {'a': 1}\n"
        "@pipeline.consumer(timeout=0.05)\n"
        "def wait(row: dict[str, int]) -> None:\n    time.sleep(60)\n"
    )

    assert ended("run", "slow.py", "-q", "--dead-letters", "dead.jsonl").returncode == 1

    (one,) = letters_in("dead.jsonl")
    assert (one["error"], one["item"], one["item_type"]) == ("TimeLimitExceeded", {"a": 1}, "dict")


def test_what_was_cancelled_on_threads_is_in_the_file_though_it_has_no_json_form(here: Path) -> None:
    (here / "tuples.py").write_text(
        "from collections.abc import Iterator\nfrom typing import Any\n"
        "from jobq import Pipeline\n"
        "pipeline = Pipeline('tuples')\n"
        "@pipeline.producer\ndef rows() -> Iterator[Any]:\n    yield from [(n, n) for n in range(3)]\n"
        "@pipeline.consumer\ndef fail(row: Any) -> None:\n    raise ValueError\n"
    )

    ended("run", "tuples.py", "-q", "-x", "-b", "thread", "--dead-letters", "dead.jsonl")

    letters = letters_in("dead.jsonl")
    items = sorted(pickle.loads(base64.b64decode(one["item_pickle"])) for one in letters)
    assert items == [(n, n) for n in range(len(letters))]
    assert {one["status"] for one in letters} >= {"dead"}


# ── list ─────────────────────────────────────────────────────────────────────


def test_the_list_has_a_line_per_letter_and_fits_the_terminal() -> None:
    file = written(
        letter(message="first\nsecond", item={"text": "x" * 500}),
        letter(stage="a-very-long-name-of-a-stage", job=123456789, status="cancelled", error=""),
        pickled((1, 2)),
        letter(stage="hens", job=None, item=None),
    )

    told = jobq("dead", "list", file, COLUMNS="80")

    assert told.exit_code == 0
    head, *rows = told.stdout.splitlines()
    assert head.split() == ["#", "stage", "job", "status", "error", "item"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4"]
    assert max(map(len, [head, *rows])) <= 80
    assert "ValueError: first" in rows[0]
    assert "second" not in told.stdout
    assert "(Egg, pickled)" in rows[2]


def test_an_empty_file_has_no_letters() -> None:
    for command in (["list"], ["show"], ["replay"]):
        told = jobq("dead", *command, written())

        assert (told.exit_code, told.stdout) == (0, "")
        assert "no dead letters" in told.stderr


@pytest.mark.parametrize("command", ["list", "show", "replay"])
def test_a_file_that_is_not_there_is_a_usage_error(command: str) -> None:
    told = jobq("dead", command, "nowhere.jsonl")

    assert told.exit_code == 2
    assert "'nowhere.jsonl' does not exist" in told.stderr


def test_a_line_that_is_no_letter_is_named_and_the_others_are_listed() -> None:
    file = written(letter(), b'{"run": "torn', b"", letter(), {"run": 1})

    told = jobq("dead", "list", file)

    assert told.exit_code == 1
    assert [row.split()[0] for row in told.stdout.splitlines()[1:]] == ["1", "4"]
    assert "line 2 is no dead letter: it is no JSON" in told.stderr
    assert "line 5 is no dead letter: field 'run'" in told.stderr


def test_a_list_that_nobody_reads_to_its_end_ends_quietly() -> None:
    file = written(*[letter()] * 5000)

    with subprocess.Popen(
        [*JOBQ, "dead", "list", file], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as listing:
        assert listing.stdout is not None
        assert listing.stderr is not None
        listing.stdout.readline()
        listing.stdout.close()
        said = listing.stderr.read()
        assert listing.wait(30) == 141
    assert said == b""


def test_a_file_is_listed_as_it_is_read(here: Path) -> None:
    os.mkfifo(here / "endless")

    with subprocess.Popen([*JOBQ, "dead", "list", "endless"], stdout=subprocess.PIPE) as listing:
        with (here / "endless").open("w") as file:
            print(json.dumps(letter()), file=file, flush=True)
            assert listing.stdout is not None
            listing.stdout.readline()
            assert listing.stdout.readline().startswith(b"1 ")
        assert listing.wait(30) == 0


# ── show ─────────────────────────────────────────────────────────────────────


def test_show_tells_everything_of_one_letter() -> None:
    file = written(letter(), letter(job=8, key="k", item={"name": "Ä", "tags": [1]}, traceback="T\n  at x\n"))

    told = jobq("dead", "show", file, "2")

    assert told.exit_code == 0
    assert told.stdout.splitlines() == [
        "letter    2",
        "stage     cook",
        "job       8",
        "key       k",
        "status    dead after 2 attempts, 1 delivery",
        "error     ValueError",
        "message   rotten",
        "time      2024-01-01T00:00:00+00:00",
        "run       r1",
        "pipeline  farm",
        "target    farm.py",
        "item type Egg",
        "item",
        "  {",
        '    "name": "Ä",',
        '    "tags": [',
        "      1",
        "    ]",
        "  }",
        "traceback",
        "  T",
        "    at x",
    ]


def test_show_without_a_number_tells_of_all_letters() -> None:
    told = jobq("dead", "show", written(letter(job=1), letter(job=2)))

    assert [line.split()[1] for line in told.stdout.splitlines() if line.startswith("job")] == ["1", "2"]


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [("9", 2, "has no letter in line 9"), ("0", 2, "x>=1"), ("2", 1, "line 2 is no dead letter")],
)
def test_a_letter_that_is_not_there_can_not_be_shown(number: str, code: int, said: str) -> None:
    told = jobq("dead", "show", written(letter(), b"torn"), number)

    assert (told.exit_code, told.stdout) == (code, "")
    assert said in " ".join(told.stderr.split())


# ── a stranger's file ────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"job": ' + b"9" * 5000 + b"}",
        json.dumps(letter(job="seven")).encode(),
        json.dumps(letter(job=1e400)).encode(),
        json.dumps(letter(stage=["cook"])).encode(),
        json.dumps(letter(status="alive")).encode(),
        json.dumps(letter(attempts={})).encode(),
        json.dumps(letter(traceback=None)).encode(),
        json.dumps(letter(time="noon")).encode(),
        json.dumps(letter(item_pickle=[1])).encode(),
        json.dumps({name: value for name, value in letter().items() if name != "stage"}).encode(),
    ],
    ids=lambda line: ascii(line[:20]),
)
def test_a_line_of_any_kind_is_a_letter_or_none(line: bytes) -> None:
    assert isinstance(read_line(line), NoLetter)

    for command in ("list", "show", "replay"):
        told = jobq("dead", command, written(line))
        assert told.exit_code in (1, 2)
        assert "line 1" in told.stderr
        assert "bug" not in told.stderr


@pytest.mark.parametrize("evil", ["\x1b]0;owned\x07", "\x9b31m", "\r", "\u202egnp", "\u2028", "\ud800", "\0"])
def test_no_character_reaches_the_terminal_that_it_could_take_for_an_order(evil: str) -> None:
    texts = ("run", "pipeline", "target", "stage", "key", "item_type", "error", "message", "traceback")
    file = written(letter(**dict.fromkeys(texts, f"a{evil}b"), item={evil: [evil]}), b'{"run": "\x1b[2J')

    for command in ("list", "show", "replay"):
        told = jobq("dead", command, file)
        shown = told.stdout + told.stderr
        assert "Error" not in shown or told.exit_code in (1, 2)
        assert [c for c in shown if not c.isprintable() and c != "\n"] == []


def test_to_list_or_show_a_letter_loads_no_pickle() -> None:
    file = written(pickled(Evil()))

    assert "pickled" in jobq("dead", "list", file).stdout
    assert "pickled" in jobq("dead", "show", file).stdout
    assert not Path("struck").exists()


def test_a_pickle_is_loaded_only_if_the_user_says_so() -> None:
    file = written(letter(), pickled(Evil()), pickled(Evil()))

    refused = jobq("dead", "replay", file, "--inline")

    assert refused.exit_code == 2
    assert "2 letters in some.jsonl (lines 2, 3) of 3 have items that are pickled" in refused.stderr
    assert "--unsafe-pickle" in refused.stderr
    assert lines_of("cooked") == []
    assert not Path("struck").exists()

    jobq("dead", "replay", file, "--inline", "--unsafe-pickle")

    assert Path("struck").exists()  # so the test above can fail


def test_a_letter_with_both_forms_of_its_item_is_read_from_the_harmless_one() -> None:
    file = written(pickled(Evil()) | {"item": {"number": 2}})

    assert jobq("dead", "replay", file, "--inline", "-q").exit_code == 0
    assert lines_of("cooked") == ["Egg(number=2, marks=())"]
    assert not Path("struck").exists()


HARMFUL = "import os\nos.mkdir('struck')\n"


@pytest.mark.parametrize(
    "target",
    [
        "os:system",
        "harmful.py",
        "harmful.py:pipeline",
        "harmful",
        "harmful:pipeline",
        "../outside.py",
        "linked.py",
        "/etc/passwd",
        "nowhere.py",
        "broken.py",
        "farm.py:x:",
        "\0",
        "",
        ".",
        "other.py:farm.py",
    ],
)
def test_a_file_of_letters_does_not_choose_what_code_runs(target: str, here: Path) -> None:
    inner = here / "here"
    inner.mkdir()
    os.chdir(inner)
    (inner / "harmful.py").write_text(HARMFUL)
    (inner / "other.py:farm.py").write_text(HARMFUL)
    (inner / "other.py").write_text(FARM)
    (inner / "broken.py").write_text(HARMFUL + "(")
    (here / "outside.py").write_text(HARMFUL + FARM)
    (inner / "linked.py").symlink_to(here / "outside.py")

    told = jobq("dead", "replay", written(letter(target=target)), "--inline")

    assert told.exit_code == 2
    assert "--target" in told.stderr
    assert not Path("struck").exists()


@pytest.mark.parametrize("targets", [["farm.py", "farm2.py"], [None], [None, "farm.py"]])
def test_letters_without_a_single_target_need_one_from_the_user(targets: list[str | None]) -> None:
    file = written(*[letter(target=target) for target in targets])

    told = jobq("dead", "replay", file, "--inline")

    assert told.exit_code == 2
    assert "--target" in told.stderr
    assert jobq("dead", "replay", file, "--inline", "-q", "--target", "farm.py").exit_code == 0
    assert len(lines_of("cooked")) == len(targets)


@pytest.mark.parametrize("target", ["farm.py", "farm.py:pipeline", "sub.farm:pipeline", "{here}/sub/farm.py"])
def test_a_target_of_ours_is_used_and_named(target: str, here: Path) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "farm.py").write_text(FARM)
    target = target.format(here=here)

    told = jobq("dead", "replay", written(letter(target=target)), "--inline")

    assert told.exit_code == 0
    assert f"replaying 1 letter of some.jsonl with {target}" in told.stderr
    assert lines_of("eaten") == ["'meal 1'"]


# ── replay ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "how", [["-b", "joinable"], ["-b", "pipe", "--start-method", "spawn"], ["-b", "thread"], ["--inline"]]
)
def test_each_letter_enters_at_its_stage_and_goes_on_downstream(how: list[str]) -> None:
    file = of_a_broken_run()
    Path("cooked").unlink()
    Path("eaten").unlink()

    command = [*JOBQ, "dead", "replay", str(file), "-o", "-", *how]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert lines_of("cooked") == [f"Egg(number={n}, marks=('a', 'b'))" for n in (1, 3)]
    assert lines_of("eaten") == ["'meal 0'", "'meal 1'", "'meal 3'"]
    assert sorted(map(json.loads, told.stdout.splitlines())) == ["MEAL 0", "MEAL 1", "MEAL 3"]
    assert "left out: 1 letter of producers" in told.stderr
    assert told.returncode == 1, "what was left out is not done"
    assert [one.name for one in Path().glob("*.jsonl")] == ["dead.jsonl"]


def test_a_replay_that_leaves_nothing_out_ends_with_code_0() -> None:
    assert jobq("dead", "replay", written(letter(), letter(job=8)), "--inline").exit_code == 0


def test_results_of_a_replay_that_nobody_writes_are_told() -> None:
    file = written(letter(), letter(job=8))

    told = jobq("dead", "replay", file, "--inline")
    eaten = jobq("dead", "replay", written(letter(item={"number": 100})), "--inline")

    assert "2 results went nowhere: with -o FILE results are written" in told.stderr
    assert "nowhere" not in eaten.stderr, "there is no result"
    for more in (["-o", "results.jsonl"], ["-q"]):
        assert "nowhere" not in jobq("dead", "replay", file, "--inline", *more).stderr


def test_what_dies_again_goes_to_a_new_file_that_can_be_replayed() -> None:
    file = Path(written(letter(item={"number": 1}), letter(item={"number": 2}), letter(item={"number": 3})))
    before = file.read_bytes()
    Path("broken").touch()

    assert jobq("dead", "replay", str(file), "--inline", "-q").exit_code == 1

    assert file.read_bytes() == before
    (again,) = (one for one in Path().glob("*.jsonl") if one != file)
    assert sorted(one["item"]["number"] for one in letters_in(again)) == [1, 3]
    assert {(one["stage"], one["target"]) for one in letters_in(again)} == {("cook", "farm.py")}
    Path("broken").unlink()
    Path("cooked").unlink()
    assert jobq("dead", "replay", str(again), "--inline", "-q").exit_code == 0
    assert len(lines_of("cooked")) == 2


@pytest.mark.parametrize("option", ["--dead-letters", "--output"])
def test_the_file_that_is_read_is_never_written(option: str) -> None:
    file = written(letter())
    os.link(file, "alias.jsonl")

    for name in (file, "./some.jsonl", "alias.jsonl"):
        told = jobq("dead", "replay", file, "--inline", option, name)
        assert told.exit_code == 2
        assert "itself" in told.stderr
    assert letters_in(file) == [letter()]
    assert lines_of("cooked") == []


def test_cancelled_letters_are_replayed_too() -> None:
    file = written(letter(status="cancelled", error="", traceback="", attempts=1))

    assert jobq("dead", "replay", file, "--inline", "-q").exit_code == 0
    assert lines_of("eaten") == ["'meal 1'"]


def test_letters_whose_item_is_not_known_and_lines_that_are_none_are_said_and_left_out() -> None:
    file = written(
        letter(), letter(item=None), b"torn", letter(stage="hens", item=None), letter(stage="input", item="x")
    )

    told = jobq("dead", "replay", file, "--inline")

    assert told.exit_code == 1
    assert "2 letters of producers" in told.stderr
    assert "1 letter without an item (line 2)" in told.stderr
    assert "no dead letter: line 3" in told.stderr
    assert len(lines_of("cooked")) == 1


def test_a_stage_that_the_pipeline_has_not_is_said_before_anything_runs() -> None:
    told = jobq("dead", "replay", written(letter(), letter(stage="boil")), "--inline")

    assert told.exit_code == 2
    assert "has no stage 'boil'" in told.stderr
    assert "it has cook, eat" in told.stderr
    assert lines_of("cooked") == []


def test_an_item_that_is_not_of_its_stage_s_type_dies_there_again() -> None:
    file = written(letter(item={"number": "many"}), letter(item={"number": 2}))

    assert jobq("dead", "replay", file, "--inline", "-q", "--dead-letters", "new.jsonl").exit_code == 1

    (one,) = letters_in("new.jsonl")
    assert (one["stage"], one["error"], one["item"]) == ("cook", "PayloadError", {"number": "many"})
    assert len(lines_of("cooked")) == 1


@pytest.mark.parametrize("how", [["-b", "joinable"], ["-b", "thread"]])
def test_a_pickle_that_can_not_be_loaded_is_a_dead_letter_that_names_its_line(how: list[str]) -> None:
    bad = letter(item=None, item_pickle=base64.b64encode(b"\x80\x05cnowhere\nThing\n.").decode())
    file = written(letter(), bad, letter(item=None, item_pickle="!"))

    told = ended("dead", "replay", file, "--unsafe-pickle", "-q", "--dead-letters", "new.jsonl", *how)

    assert told.returncode == 1
    messages = sorted(one["message"] for one in letters_in("new.jsonl"))
    assert "some.jsonl, line 2: ModuleNotFoundError" in messages[0]
    assert "some.jsonl, line 3" in messages[1]
    assert len(lines_of("cooked")) == 1


def test_a_replay_takes_the_parameters_that_the_run_took(here: Path) -> None:
    (here / "tagged.py").write_text(
        "from collections.abc import Iterator\n"
        "from jobq import Pipeline\n"
        "pipeline = Pipeline('tagged')\n"
        "@pipeline.producer\n"
        "def numbers() -> Iterator[int]: yield 1\n"
        "@pipeline.consumer\n"
        "def work(number: int, tag: str) -> str: return {'good': 'done'}[tag]\n"
    )

    assert ended("run", "tagged.py", "-q", "--dead-letters", "dead.jsonl", "-p", "tag=bad").returncode == 1
    again = ended("dead", "replay", "dead.jsonl", "-q", "-o", "-", "-p", "tag=good")
    without = ended("dead", "replay", "dead.jsonl", "-q")

    assert (again.returncode, again.stdout) == (0, '"done"\n'), again.stderr
    assert without.returncode == 2
    assert "-p tag=" in without.stderr


def test_every_item_comes_back_as_it_was_through_a_run_and_its_replay(here: Path) -> None:
    (here / "kinds.py").write_text(KINDS)

    assert ended("run", "kinds.py", "-q", "--dead-letters", "dead.jsonl").returncode == 1
    first = lines_of("seen")
    Path("seen").unlink()
    again = ended("dead", "replay", "dead.jsonl", "-p", "bad=no", "--unsafe-pickle")

    assert (again.returncode, len(first)) == (0, 9), again.stderr
    assert lines_of("seen") == first
    forms = {one["stage"]: "item" in one for one in letters_in("dead.jsonl")}
    assert forms == {"model": True, "day": True, "row": True, "pair": True, "anything": False, "many": True}


KINDS = """
import dataclasses, datetime as dt
from collections.abc import Iterator
from typing import NamedTuple, TypedDict
from pydantic import BaseModel
from jobq import Pipeline

pipeline = Pipeline("kinds")

class Model(BaseModel):
    raw: bytes
    by: dict[int, set[str]]

@dataclasses.dataclass(frozen=True)
class Day:
    date: dt.date

class Row(TypedDict):
    when: tuple[dt.datetime, ...]

class Pair(NamedTuple):
    a: float
    b: str

@pipeline.producer
def give() -> Iterator[Model | Day | Row | Pair | frozenset[int] | complex]:
    for n in (1, 2):
        yield Model(raw=b"x", by={n: {"a"}})
    yield Day(dt.date(2024, 1, 1))
    yield Row(when=(dt.datetime(2024, 1, 1), dt.datetime(2024, 1, 2)))
    yield Pair(float("inf"), "x")
    yield frozenset({1})
    yield frozenset({2})
    yield 1 + 2j
    yield 3j

def seen(item: object, bad: bool) -> None:
    with open("seen", "a") as file:
        file.write(repr(item) + "\\n")
    if bad:
        raise ValueError("bad")

@pipeline.consumer
def model(item: Model, bad: bool = True) -> None:
    seen(item, bad)

@pipeline.consumer(validate=False)
def day(item: Day, bad: bool = True) -> None:
    seen(item, bad)

@pipeline.consumer
def row(item: Row, bad: bool = True) -> None:
    seen(item, bad)

@pipeline.consumer(key=lambda pair: pair.b)
def pair(item: Pair, bad: bool = True) -> None:
    seen(item, bad)

@pipeline.consumer(batch=1)
def many(items: list[frozenset[int]], bad: bool = True) -> None:
    seen(items, bad)

@pipeline.consumer
def anything(item: object, bad: bool = True) -> None:
    seen(item, bad)
"""


def test_a_replay_takes_the_options_of_a_run_but_for_its_input() -> None:
    names = {option.name for option in run.params} - {"target", "input"}

    assert names <= {option.name for option in replay.params}
    assert "--input" not in jobq("dead", "replay", "--help").stdout
    told = jobq("dead", "replay", written(letter()), "-p", "nothing=1", JOBQ_BACKEND="inline")
    assert told.exit_code == 2
    assert "nothing" in told.stderr
    assert isinstance(replay, click.Command)


# ── in this process ──────────────────────────────────────────────────────────


def debugged(commands: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobq.cli", "dead", "replay", *arguments],
        input=commands, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


def test_pdb_opens_where_a_job_raised_once_a_job_and_the_replay_goes_on() -> None:
    Path("broken").touch()
    file = written(letter(item={"number": 1}), letter(item={"number": 2}), letter(item={"number": 3}))

    told = debugged("p 'number', egg.number\nq\np 'number', egg.number\nc\n", file, "--pdb", "-q")

    assert told.returncode == 1
    assert told.stdout.count("('number', 1)") == told.stdout.count("('number', 3)") == 1
    assert told.stdout.count("raise ValueError(") == 2, "a retry does not open it again"
    assert "cook, job 0: ValueError: egg 1 is\\nrotten" in told.stderr
    assert lines_of("eaten") == ["'meal 2'"]
    assert len(lines_of("cooked")) == 5


def test_pdb_without_anybody_who_types_goes_on() -> None:
    Path("broken").touch()

    told = debugged("", written(letter(), letter(item={"number": 2})), "--pdb", "-q")

    assert told.returncode == 1
    assert lines_of("eaten") == ["'meal 2'"]


def test_inline_lets_breakpoint_work(here: Path) -> None:
    (here / "farm.py").write_text(FARM.replace('    note("cooked"', '    breakpoint()\n    note("cooked"'))

    told = debugged("p 'number', egg.number\nc\n", written(letter()), "--inline", "-q")

    assert told.returncode == 0
    assert "('number', 1)" in told.stdout
    assert lines_of("eaten") == ["'meal 1'"]


@pytest.mark.parametrize("flag", ["--inline", "--pdb"])
def test_inline_is_a_backend_of_its_own(flag: str) -> None:
    told = jobq("dead", "replay", written(letter()), flag, "-b", "pipe")

    assert told.exit_code == 2
    assert "leave out -b pipe" in told.stderr
    assert jobq("dead", "replay", written(letter()), flag, "-q", JOBQ_BACKEND="pipe").exit_code == 0


def test_a_letter_of_a_run_can_be_read_back_whole() -> None:
    file = of_a_broken_run("-b", "inline")

    read = [read_line(line) for line in file.read_bytes().splitlines()]

    assert {one.stage for one in read if isinstance(one, Letter)} == {"hens", "cook", "eat"}
    assert all(isinstance(one, Letter) for one in read)
