"""What is shown of a run: each observer is fed events by hand and judged by what it writes."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import pickle
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from jobq.events import (
    Event,
    JobDead,
    JobRetried,
    ProducerEnded,
    Progress,
    RunEnded,
    RunStarted,
    Stopping,
    Tick,
    WorkerEnded,
    WorkerLostEvent,
    WorkerStarted,
)
from jobq.observe import observing
from jobq.observe.dead_file import DeadLetterFile
from jobq.observe.events_log import LogObserver
from jobq.observe.log import LogSettings, configure, logger, read_log_settings
from jobq.observe.progress import LiveProgress
from jobq.observe.summary import duration, number, rate, summary
from jobq.observe.text import plain, safe_repr, write
from jobq.options import RunOptions, dead_letter_path
from jobq.report import DeadLetter, EdgeCounts, Report, StageCounts

STARTED = RunStarted("r1", "zoo", "pipe", "fork", ("rows", "parse"))
ENDED = RunEnded("r1", 2.0, {"parse": StageCounts(received=3, done=3)})


class Hostile:
    """Raises wherever it is looked at."""

    error: type[BaseException] = RuntimeError

    def __repr__(self) -> str:
        raise self.error("no repr")

    __str__ = __repr__


class Exiting(Hostile):
    """Raises what no ``except Exception`` catches."""

    error = SystemExit


def letter(**fields: Any) -> DeadLetter:
    given: dict[str, Any] = {
        "run": "r1",
        "pipeline": "zoo",
        "stage": "parse",
        "job": 7,
        "error": "ValueError",
    }
    return DeadLetter(**(given | fields))


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(autouse=True)
def logging_left_as_it_was() -> Iterator[None]:
    log = logging.getLogger("jobq")
    before = (log.handlers[:], log.level, log.propagate)
    yield
    log.handlers, level, log.propagate = before
    log.setLevel(level)


def console(stream: io.StringIO, *events: Event, level: str = "debug") -> list[str]:
    """Return the console's lines for *events*, without the clock."""
    configure(LogSettings(level=level), stream)
    observer = LogObserver()
    for event in events:
        observer(event)
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in stream.getvalue().splitlines()]


# --- the log -------------------------------------------------------------------------------------


def test_a_job_log_line_is_json_with_what_is_bound(stream: io.StringIO) -> None:
    configure(LogSettings(format="json"), stream)

    logger(run="r1", stage="fetch", worker="fetch-1", job="12", attempt=2).info("got %s", "it", size=3)

    told = json.loads(stream.getvalue())
    assert told.pop("time").endswith("+00:00")
    assert told == {
        "level": "info",
        "event": "got it",
        "run": "r1",
        "stage": "fetch",
        "worker": "fetch-1",
        "job": "12",
        "attempt": 2,
        "size": 3,
    }


def test_a_job_log_line_on_a_console_names_the_stage_and_the_fields(stream: io.StringIO) -> None:
    configure(LogSettings(), stream)

    logger(run="r1", stage="fetch", job=12).warning("slow page", url="http://x/", why="two words")

    assert re.fullmatch(
        r"\d\d:\d\d:\d\d warning  fetch: slow page job=12 url=http://x/ why='two words'\n", stream.getvalue()
    )


@pytest.mark.parametrize("form", ["console", "json"])
@pytest.mark.parametrize(
    "value",
    [Hostile(), 10**5000, "\ud800", float("nan"), float("-inf"), b"\xff", {Hostile(): {1: {2}}}, object()],
    ids=["hostile", "huge", "surrogate", "nan", "inf", "bytes", "nested", "object"],
)
def test_no_value_breaks_a_log_line(stream: io.StringIO, form: Any, value: object) -> None:
    configure(LogSettings(format=form), stream)

    logger(value=value).info("a value", other=[value])
    logger().info("%s", value)
    logger().info(value)  # type: ignore[arg-type]  # no text, and no error

    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    if form == "json":
        assert all(json.loads(line, parse_constant=pytest.fail)["level"] == "info" for line in lines)


def test_a_list_that_holds_itself_is_shown() -> None:
    ring: list[Any] = []
    ring.append(ring)

    assert json.dumps(plain(ring))


def test_what_a_user_calls_like_ours_is_kept(stream: io.StringIO) -> None:
    configure(LogSettings(format="json"), stream)

    logger().info("later", time=3, level="deep")

    told = json.loads(stream.getvalue())
    assert (told["time_"], told["level_"], told["level"]) == (3, "deep", "info")


def test_control_characters_do_not_reach_the_terminal(stream: io.StringIO) -> None:
    configure(LogSettings(), stream)

    logger().info("a\x1b[2Jb\r\x07", value="\x9b2J")

    assert stream.getvalue().endswith("jobq: a\\x1b[2Jb\\x0d\\x07 value='\\x9b2J'\n")


def test_a_traceback_goes_along(stream: io.StringIO) -> None:
    configure(LogSettings(format="json"), stream)

    try:
        raise ValueError("bad")
    except ValueError:
        logger().exception("it failed")

    assert "ValueError: bad" in json.loads(stream.getvalue())["traceback"]


def test_lines_below_the_level_are_not_written(stream: io.StringIO) -> None:
    configure(LogSettings(level="error"), stream)

    logger().warning("not this")
    logger().error("this")

    assert "not this" not in stream.getvalue()
    assert "this" in stream.getvalue()


def test_what_was_configured_can_be_put_back(stream: io.StringIO) -> None:
    log = logging.getLogger("jobq")
    before = (log.handlers[:], log.level, log.propagate)

    restore = configure(LogSettings(), stream)
    assert (log.handlers, log.level, log.propagate) != before
    restore()

    assert (log.handlers, log.level, log.propagate) == before


def test_unconfigured_lines_go_to_the_programs_own_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        logger(stage="fetch").info("got it", name="sam", args=(1,), module="m")

    assert caplog.messages == ["got it stage=fetch name=sam args=(1,) module=m"]


def test_a_program_without_logging_sees_nothing() -> None:
    code = "from jobq.observe.log import logger; logger().error('nobody asked')"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)

    assert (done.stdout, done.stderr) == (b"", b"")


def test_each_line_is_one_write(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        configure(LogSettings(format="json"), file)
        logger().info("x" * 100_000)
        at_once = (tmp_path / "log").stat().st_size

    assert at_once > 100_000  # nothing waited in a buffer


def test_a_full_disk_and_a_closed_stream_raise_nothing() -> None:
    closed = io.StringIO()
    closed.close()
    with Path("/dev/full").open("w") as full:
        for stream in closed, full:
            configure(LogSettings(), stream)
            logger().error("into the void")

            assert not write(stream, "into the void")


def test_settings_follow_the_options_and_the_stream(stream: io.StringIO) -> None:
    assert read_log_settings(None, None, stream) is None
    assert read_log_settings("debug", None, stream) == LogSettings("debug", "json")
    assert read_log_settings(None, "console", stream, live=True) == LogSettings("info", "console")
    settings = LogSettings("error", "json", colour=True, live=True)
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_a_repr_is_short_and_never_raises() -> None:
    assert safe_repr(Exiting()) == "<Exiting, its repr raises SystemExit>"
    assert safe_repr(10**5000) == "<int, 16,610 bits>"
    assert len(safe_repr("x" * 10_000)) == 200


# --- events in words -----------------------------------------------------------------------------


def test_a_lost_worker_is_named_with_what_becomes_of_its_item(stream: io.StringIO) -> None:
    lost = WorkerLostEvent(
        "parse", "parse-2", 4711, "was killed by SIGKILL (out of memory?)", (1234,), 1, 2, 3
    )

    (line,) = console(stream, lost)

    assert line == (
        "warning  jobq: worker 2 of stage parse (pid 4711) was killed by SIGKILL (out of memory?) while on "
        "item 1234; the item goes to another worker, attempt 2 of 3"
    )


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (
            WorkerLostEvent("parse", "parse-1", None, "exited", (), 0),
            "warning  jobq: worker 1 of stage parse exited",
        ),
        (
            WorkerLostEvent("p", "w", 1, "exited", (), 3),
            "warning  jobq: worker w of stage p (pid 1) exited; 3 items that it had not begun go to others",
        ),
        (
            WorkerLostEvent("p", "w", None, "ended", (3, 4), 2),
            "warning  jobq: worker w of stage p ended while on items 3, 4; the items go to other workers",
        ),
        (
            WorkerLostEvent("p", "w", None, "ended", (3,), 2),  # the third time: 3 is given up
            (
                "warning  jobq: worker w of stage p ended while on item 3; "
                "2 items that it had not begun go to others"
            ),
        ),
        (
            WorkerLostEvent("p", "p-1.2", None, "ended", (3,), 0),
            "warning  jobq: worker 1.2 of stage p ended while on item 3",
        ),
        (
            Stopping(1, "interrupted", 12),
            "warning  jobq: interrupted; finishing 12 accepted items, press Ctrl-C again to stop now",
        ),
        (
            Stopping(3, "interrupted", 1),
            "warning  jobq: interrupted; killing the workers, 1 accepted item unfinished",
        ),
        (
            JobRetried("parse", "w", 5, 1, "OSError", "gone", 0.25),
            "info     jobq: item 5 failed in stage parse (attempt 1), next try in 0.2 s: OSError: gone",
        ),
        (
            JobDead("w", letter(message="no number")),
            "error    jobq: item 7 failed in stage parse: ValueError: no number",
        ),
        (
            JobDead("w", letter(job=None, stage="rows", error="OSError", message="gone")),
            "error    jobq: producer rows stopped: OSError: gone",
        ),
        (
            JobDead("w", letter(error="WorkerLost", deliveries=3), '{"a": 1}'),
            'error    jobq: item 7 of stage parse killed its worker 3 times and is given up: {"a": 1}',
        ),
        (ProducerEnded("rows", "rows-1", 1310), "debug    jobq: producer rows ended after 1,310 items"),
        (WorkerStarted("parse", "parse-1", 9), "debug    jobq: worker 1 of stage parse (pid 9) started"),
        (WorkerEnded("parse", "parse-1", 9), "debug    jobq: worker 1 of stage parse (pid 9) ended"),
        (
            WorkerEnded("parse", "parse-1", 9, "it has had enough"),
            "info     jobq: worker 1 of stage parse (pid 9) ended and is replaced: it has had enough",
        ),
        (STARTED, "info     jobq: run r1 of zoo started: rows → parse (backend pipe, fork)"),
        (ENDED, "info     jobq: run r1 ended after 2.0 s"),
    ],
)
def test_an_event_is_a_sentence(stream: io.StringIO, event: Event, said: str) -> None:
    assert console(stream, event) == [said]


def test_ten_retirements_are_told_and_the_rest_is_for_who_looks_closer(stream: io.StringIO) -> None:
    retired = [WorkerEnded("parse", f"parse-1.{n}", 9, "it has had enough") for n in range(50)]

    levels = [line.split()[0] for line in console(stream, *retired)]

    assert levels == ["info"] * 10 + ["debug"] * 40


def test_ten_failures_are_told_with_traceback_and_the_rest_is_counted(stream: io.StringIO) -> None:
    dead = [JobDead("w", letter(job=n, traceback="Traceback…\nValueError\n")) for n in range(1234)]

    lines = console(stream, STARTED, *dead, ENDED, level="warning")

    assert sum("failed in stage parse" in line for line in lines) == 10
    assert lines.count("Traceback…") == 10
    assert lines[-2:] == [
        "warning  jobq: 10 jobs failed; further ones are only counted",
        "error    jobq: 1,224 more jobs failed",
    ]


def test_cancelled_jobs_are_counted_alone(stream: io.StringIO) -> None:
    lines = console(stream, *[JobDead("w", letter(status="cancelled"))] * 3, ENDED, level="warning")

    assert lines == ["warning  jobq: 3 items cancelled"]


def test_events_are_json_with_what_the_sentence_says(stream: io.StringIO) -> None:
    configure(LogSettings(format="json"), stream)
    observer = LogObserver()
    for event in STARTED, JobDead("parse-1", letter(message="bad", traceback="Traceback…")), ENDED:
        observer(event)

    started, dead, ended = map(json.loads, stream.getvalue().splitlines())
    assert (started["backend"], started["pipeline"], started["run"]) == ("pipe", "zoo", "r1")
    assert (dead["stage"], dead["job"], dead["worker"], dead["run"]) == ("parse", 7, "parse-1", "r1")
    assert dead["traceback"] == "Traceback…"
    assert ended["stages"]["parse"]["done"] == 3


# --- the dead-letter file ------------------------------------------------------------------------


def dead_file(folder: Path, name: str = "{pipeline}-{run}.dead.jsonl") -> DeadLetterFile:
    return DeadLetterFile(folder / name, run="r1", pipeline="zoo", target="zoo.py")


def test_no_file_is_made_without_a_dead_letter(tmp_path: Path) -> None:
    file = dead_file(tmp_path)

    file(STARTED)
    file(ENDED)
    file.close()

    assert list(tmp_path.iterdir()) == []


def test_each_letter_is_a_line_with_these_fields(tmp_path: Path) -> None:
    file = dead_file(tmp_path)

    file(JobDead("w", letter(key="k", message="bad", attempts=2, item_type="zoo.Cat"), '{"name": "Tom"}'))
    file(JobDead("w", letter(status="cancelled"), None, b"pickled"))
    file(JobDead("w", letter(job=None)))
    file.close()

    assert file.path == tmp_path / "zoo-r1.dead.jsonl"
    first, second, third = map(json.loads, file.path.read_text().splitlines())
    assert first.pop("time").startswith("20")
    assert first == {
        "run": "r1",
        "pipeline": "zoo",
        "target": "zoo.py",
        "stage": "parse",
        "job": 7,
        "key": "k",
        "item": {"name": "Tom"},
        "item_type": "zoo.Cat",
        "status": "dead",
        "attempts": 2,
        "deliveries": 1,
        "error": "ValueError",
        "message": "bad",
        "traceback": "",
    }
    assert set(second) == {*first, "time", "item_pickle"} - {"item"}
    assert base64.b64decode(second["item_pickle"]) == b"pickled"
    assert second["status"] == "cancelled"
    assert third["item"] is None


def test_text_that_is_no_text_is_still_a_line_of_json(tmp_path: Path) -> None:
    file = dead_file(tmp_path)

    file(JobDead("w", letter(message="a\ud800\0\n\u2028", item_type="ü"), '["\ud800",\n 1]'))
    file.close()

    (line,) = file.path.read_text("ascii").splitlines()
    assert json.loads(line)["message"] == "a\ud800\0\n\u2028"
    assert json.loads(line)["item"] == ["\ud800", 1]


def test_a_letter_is_in_the_file_at_once_and_after_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"run": "r0"}\n')
    file = dead_file(tmp_path, "mine.jsonl")

    file(JobDead("w", letter()))

    assert [json.loads(line)["run"] for line in file.path.read_text().splitlines()] == ["r0", "r1"]
    file.close()


def test_the_file_is_closed_at_the_end_of_the_run(tmp_path: Path) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    file = dead_file(tmp_path)

    file(JobDead("w", letter()))
    file(ENDED)

    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_a_name_stays_in_its_folder(tmp_path: Path) -> None:
    made = dead_letter_path(tmp_path / "{pipeline}-{run}.dead.jsonl", pipeline="../a b", run="r1")

    assert made == tmp_path / ".._a_b-r1.dead.jsonl"
    assert dead_letter_path(tmp_path / "a{b}.jsonl", pipeline="p", run="r") == tmp_path / "a{b}.jsonl"


def test_a_full_disk_is_told_once_and_counted(stream: io.StringIO) -> None:
    configure(LogSettings(), stream)
    file = DeadLetterFile(Path("/dev/full"), run="r1", pipeline="zoo", target=None)

    for _ in range(3):
        file(JobDead("w", letter()))
    file.close()

    (line,) = stream.getvalue().splitlines()
    assert "can't be written to /dev/full: No space left on device" in line
    assert (file.written, file.unwritten) == (0, 3)


# --- the summary ---------------------------------------------------------------------------------


def report(**stages: StageCounts) -> Report:
    edges = [EdgeCounts(source="parse", target=None, emitted=7, received=7)]
    return Report(run="r1", pipeline="zoo", ok=True, seconds=2.0, stages=stages, edges=edges)


def test_the_summary_is_a_table_and_a_line() -> None:
    stages = {
        "rows": StageCounts(done=10),
        "parse": StageCounts(done=7, filtered=1, dead=2, busy_seconds=1.5),
    }

    told = summary(report(**stages), Path("zoo-r1.dead.jsonl"))

    assert told.splitlines() == [
        "stage      done  filtered      dead   retried      busy      rate",
        "rows         10         0         0         0     0.0 s     5.0/s",
        "parse         7         1         2         0     1.5 s     3.5/s",
        "zoo, run r1: 2.0 s, 7 results",
        "2 dead letters in zoo-r1.dead.jsonl",
    ]


@pytest.mark.parametrize(
    ("counts", "file", "expected"),
    [
        ({"cancelled": 27}, None, "27 cancelled"),
        ({"cancelled": 27}, Path("zoo.jsonl"), "27 cancelled in zoo.jsonl"),
        ({"dead": 1, "cancelled": 2}, Path("zoo.jsonl"), "1 dead letter, 2 cancelled in zoo.jsonl"),
    ],
)
def test_what_was_cancelled_is_told_apart_in_the_summary(
    counts: dict[str, int], file: Path | None, expected: str
) -> None:
    told = summary(report(parse=StageCounts(**counts)), file)

    assert told.splitlines()[-1] == expected


def test_the_summary_of_huge_numbers_and_names_fits_80_columns() -> None:
    huge = 10**12
    counts = StageCounts(done=huge, filtered=huge, dead=huge, cancelled=huge, retried=huge, busy_seconds=1e9)

    told = summary(report(**{"x" * 200: counts}))

    assert max(map(len, told.splitlines())) <= 80
    assert "cancelled" in told


def test_replaced_workers_are_in_the_summary() -> None:
    told = summary(report(parse=StageCounts(worker_restarts=3, redelivered=1)))

    assert "3 workers replaced, 1 job delivered again" in told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(999_999), "999,999"),
        (number(1_234_567), "1.2M"),
        (number(2.5e9), "2.5G"),
        (rate(0.04), "0.0/s"),
        (rate(12_345), "12.3k/s"),
        (duration(59.94), "59.9 s"),
        (duration(59.97), "1m00s"),
        (duration(3599.6), "1h00m"),
    ],
)
def test_numbers_are_short(text: str, expected: str) -> None:
    assert text == expected


# --- the live display ----------------------------------------------------------------------------


class Terminal:
    """A terminal of 80 columns and 10 lines, whose foreground group we are made to be."""

    def __init__(self) -> None:
        self.near, far = pty.openpty()
        ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 80, 0, 0))
        self.stream = open(far, "w")  # noqa: PTH123, SIM115  # a descriptor, closed by close()

    def written(self) -> str:
        os.set_blocking(self.near, False)
        try:
            return os.read(self.near, 1_000_000).decode()
        except BlockingIOError:
            return ""

    def close(self) -> None:
        self.stream.close()
        os.close(self.near)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("jobq.observe.progress._in_foreground", lambda _: True)
    yield terminal
    terminal.close()


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def tick(seconds: float, **stages: StageCounts) -> Tick:
    return Tick(seconds, stages)


def test_a_line_per_stage_says_what_is_done_queued_and_dead(terminal: Terminal) -> None:
    live = LiveProgress(terminal.stream)

    live(Progress("rows", "rows-1", None, None, 200))
    live(tick(2.0, rows=StageCounts(done=50), parse=StageCounts(done=40, dead=2, queued=8, in_flight=2)))

    rows, parse = (line.split() for line in bare(terminal.written()).splitlines() if line.strip())
    assert rows == ["rows", "50", "25.0/s", "25%", "6.0", "s", "left"]
    assert parse == ["parse", "42", "21.0/s", "8", "queued", "2", "in", "flight", "2", "dead"]


@pytest.mark.parametrize("total", [float("inf"), float("nan"), 0, -3, "many"])
def test_a_total_that_is_none_is_not_shown(terminal: Terminal, total: Any) -> None:
    live = LiveProgress(terminal.stream)

    live(Progress("rows", "rows-1", None, None, total))
    live(tick(2.0, rows=StageCounts(done=50)))

    assert "%" not in terminal.written()


def test_the_cursor_rests_at_the_upper_left_and_the_end_clears(terminal: Terminal) -> None:
    live = LiveProgress(terminal.stream)

    live(tick(1.0, a=StageCounts(), b=StageCounts(), c=StageCounts()))
    drawn = terminal.written()
    live(ENDED)
    live.close()

    assert drawn.startswith("\r\x1b[J\r\n")  # the line on which others may write
    assert drawn.endswith("\r\x1b[3A")
    assert terminal.written() == "\r\x1b[J"


def test_the_display_never_fills_the_screen_or_a_line(terminal: Terminal) -> None:
    live = LiveProgress(terminal.stream)

    live(tick(1.0, **{f"{n}{'x' * 100}": StageCounts(done=n) for n in range(50)}))

    lines = bare(terminal.written()).splitlines()
    assert len([line for line in lines if line.strip()]) == 8
    assert max(map(len, lines)) < 80


def test_a_log_line_clears_the_display_first(terminal: Terminal) -> None:
    configure(read_log_settings("info", None, terminal.stream, live=True), terminal.stream)

    logger().info("hello")

    assert terminal.written().startswith("\r\x1b[J")


def test_nothing_is_drawn_where_there_is_no_terminal(stream: io.StringIO) -> None:
    live = LiveProgress(stream)

    live(tick(1.0, rows=StageCounts()))
    live.close()

    assert stream.getvalue() == ""


def test_a_terminal_that_goes_away_raises_nothing(terminal: Terminal) -> None:
    live = LiveProgress(terminal.stream)
    live(tick(1.0, rows=StageCounts()))

    terminal.stream.close()

    live(tick(2.0, rows=StageCounts()))
    live.close()


# --- all together --------------------------------------------------------------------------------


def test_observers_are_those_that_the_options_ask_for(capsys: pytest.CaptureFixture[str]) -> None:
    with observing(RunOptions(log_level="info", log_format="console")) as observers:
        for observer in observers:
            observer(STARTED)
    assert "run r1 of zoo started" in capsys.readouterr().err

    with observing(RunOptions()) as observers:
        for observer in observers:
            observer(STARTED)
    assert capsys.readouterr().err == ""
