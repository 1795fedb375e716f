"""The command line: what it takes, what it says, and the code it ends with."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from jobq.cli import main
from jobq.cli.run import run as run_command
from tests.test_examples import session_members

pytestmark = pytest.mark.slow

JOBQ = [sys.executable, "-m", "jobq.cli"]

#: Runs nothing: says what it was given, and ends as the parameter `ending` says.
TOLD = """
import json
from jobq import Pipeline
from jobq.errors import BackendUnavailable, PipelineError
from jobq.outcome import Outcome
from jobq.report import Report, StageCounts

class Told(Pipeline):
    def execute(self, options, parameters, **others):
        ending = eval(parameters.get("ending", "{}"))
        if isinstance(ending, BaseException):
            raise ending
        given = options.model_dump(mode="json", exclude_unset=True)
        print(json.dumps({"options": given, "parameters": parameters, "others": sorted(others)}))
        stages = {"parse": StageCounts(done=3)}
        report = Report(run="r1", pipeline=self.name, ok=ending.pop("ok", True), seconds=1.0, stages=stages)
        return Outcome(report, **ending)

pipeline = Told("told")
"""

ZOO = """
import os
from collections.abc import Iterator
from dataclasses import dataclass
from jobq import Job, Pipeline

pipeline = Pipeline("zoo")

@dataclass
class Cat:
    name: str

@pipeline.producer
def cats(count: int = 3) -> Iterator[Cat]:
    for number in range(count):
        yield Cat(f"cat {number}")

@pipeline.consumer(workers=2)
def purr(cat: Cat, job: Job, bad: str = "") -> str:
    print("printed by a job")
    job.log.info("purring", cat=cat.name)
    if cat.name == bad:
        raise ValueError(f"{bad} bites")
    return cat.name.upper()
"""


@pytest.fixture(autouse=True)
def interpreter_left_as_it_was() -> Iterator[None]:
    modules, path = set(sys.modules), sys.path[:]
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith("jobq."):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "told.py").write_text(TOLD)
    (tmp_path / "zoo.py").write_text(ZOO)
    for name in [name for name in os.environ if name.startswith("JOBQ_")]:
        monkeypatch.delenv(name)
    return tmp_path


def jobq(*arguments: str, **environment: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, arguments, env=environment, prog_name="jobq")


def told(*arguments: str, **environment: str) -> dict[str, Any]:
    """Return what a run is given for *arguments*."""
    ended = jobq("run", "told.py", *arguments, **environment)
    assert ended.exit_code == 0, ended.output
    given: dict[str, Any] = json.loads(ended.stdout)
    return given


def started(*arguments: str, **how: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([*JOBQ, *arguments], **(pipes | how))


def ended(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a session of its own, and prove that nothing of the session is left."""
    with started(*arguments, **how) as process:
        try:
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
        left = session_members(process.pid)
    assert left == [], "processes outlived the run"
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


# --- help ----------------------------------------------------------------------------------------


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, json\n"
        "from jobq.cli import main\n"
        "try: main(['run', '--help'], prog_name='jobq')\n"
        "except SystemExit: print(json.dumps(sorted(sys.modules)))"
    )

    output = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60)

    loaded = set(json.loads(output.splitlines()[-1]))
    assert loaded & {"rich", "structlog", "multiprocessing", "asyncio"} == set()


def test_a_run_imports_what_it_needs_only(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text(
        "from jobq import Pipeline\n"
        "pipeline = Pipeline('test')\n"
        "@pipeline.producer\n"
        "def numbers() -> list[int]:\n"
        "    return [1]\n"
        "@pipeline.consumer\n"
        "def take(number: int) -> None: ...\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "jobq.cli", "run", "pipeline.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert '"event": "run ' in done.stderr  # it has logged
    loaded = {line.split("|")[2].strip() for line in done.stderr.splitlines() if line.count("|") == 2}
    assert "pydantic" in loaded
    assert loaded & {"rich", "structlog", "asyncio"} == set()


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_commands(flag: str) -> None:
    result = jobq(flag)

    assert result.exit_code == 0
    assert re.findall(r"^  (\w+) ", result.stdout.partition("Commands:")[2], re.MULTILINE) == [
        "check",
        "dead",
        "graph",
        "run",
    ]


def test_every_option_of_run_has_its_environment_variable_in_the_help() -> None:
    shown = "".join(jobq("run", "--help").stdout.split())

    for option in run_command.params:
        if isinstance(option, click.Option) and option.name != "help":
            assert option.envvar == "JOBQ_" + option.opts[-1].lstrip("-").replace("-", "_").upper()
            assert f"envvar:{option.envvar}" in shown


def test_the_version_is_told() -> None:
    assert re.fullmatch(r"jobq, version [\d.]+\n", jobq("--version").stdout)


# --- options -------------------------------------------------------------------------------------


def test_a_run_without_options_has_the_defaults_of_a_command_line() -> None:
    given = told()

    assert given["options"] == {
        "log_level": "info",
        "log_format": "json",
        "dead_letters": "{pipeline}-{run}.dead.jsonl",
        "progress": False,
    }
    assert given["parameters"] == {}


def test_the_pipelines_own_options_stand_between_the_command_line_and_its_defaults(here: Path) -> None:
    own = TOLD.replace('Told("told")', 'Told("told", log_level="warning", workers=7, backend="pipe")')
    (here / "told.py").write_text(own)

    given = told("-b", "thread")["options"]

    assert (given["log_level"], given["workers"], given["backend"]) == ("warning", 7, "thread")


def test_a_parameter_is_split_at_the_first_equals_sign_and_the_last_one_wins() -> None:
    given = told("-p", "root=a", "-p", "root=http://x/?a=b", "--param", "empty=")

    assert given["parameters"] == {"root": "http://x/?a=b", "empty": ""}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["-w", "4"], {"workers": 4}),
        (["-w", "fetch=8", "-w", "store=2"], {"workers": {"fetch": 8, "store": 2}}),
        (["-w", "4", "-w", "5"], {"workers": 5}),
        (["-w", "auto"], {"workers": "auto"}),
        (["-w", "fetch=auto", "-w", "store=2"], {"workers": {"fetch": "auto", "store": 2}}),
        (["-b", "pipe", "--start-method", "spawn"], {"backend": "pipe", "start_method": "spawn"}),
        (["-x"], {"fail_fast": True}),
        (["--max-failures", "3"], {"max_failures": 3}),
        (["--dead-letters", "d.jsonl"], {"dead_letters": "d.jsonl"}),
        (["--shutdown-timeout", "0.5"], {"shutdown_timeout": 0.5}),
        (["--input", "told.py", "--output", "out.jsonl"], {"input": "told.py", "output": "out.jsonl"}),
        (["--input", "-"], {"input": "-"}),
        (["-q"], {"log_level": "error"}),
        (["-v"], {"log_level": "debug"}),
        (["-q", "--log-level", "warning"], {"log_level": "warning"}),
        (["--log-format", "console", "--progress"], {"log_format": "console", "progress": False}),
    ],
    ids=" ".join,
)
def test_an_option_reaches_the_run(arguments: list[str], options: Mapping[str, Any]) -> None:
    given = told(*arguments)["options"]

    assert {name: given[name] for name in options} == options


def test_an_environment_variable_gives_an_option_and_the_command_line_wins() -> None:
    environment = {
        "JOBQ_BACKEND": "thread",
        "JOBQ_WORKERS": "a=1 b=2",
        "JOBQ_PARAM": "x=1 y=2",
        "JOBQ_FAIL_FAST": "1",
        "JOBQ_LOG_LEVEL": "error",
    }

    given = told("-w", "3", "--log-level", "debug", **environment)

    assert given["options"]["backend"] == "thread"
    assert given["options"]["workers"] == 3
    assert given["options"]["fail_fast"] is True
    assert given["options"]["log_level"] == "debug"
    assert given["parameters"] == {"x": "1", "y": "2"}
    assert told(**environment)["options"]["workers"] == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing argument 'TARGET'"),
        (["told.py", "-p", "root"], "'root' is not NAME=VALUE"),
        (["told.py", "-p", "=x"], "'=x' is not NAME=VALUE"),
        (["told.py", "-w", "0"], "'0' is neither N nor STAGE=N"),
        (["told.py", "-w", "fetch="], "'fetch=' is neither N nor STAGE=N"),
        (["told.py", "-w", "fetch=many"], "neither N nor STAGE=N"),
        (["told.py", "-w", "1", "-w", "a=2"], "not both"),
        (["told.py", "--max-failures", "0"], "x>=1"),
        (["told.py", "--shutdown-timeout", "-1"], "x>=0"),
        (["told.py", "--start-method", "vfork"], "'vfork' is not one of"),
        (["told.py", "--input", "nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["told.py", "-o", "no/where.jsonl"], "there is no folder no"),
        (["told.py", "--dead-letters", "no/where.jsonl"], "there is no folder no"),
        (["told.py", "--resume"], "No such option"),
        (["nowhere.py"], "nowhere.py does not exist"),
        (["told.py:third"], "told.py has no variable third"),
        (["told.py", "--shutdown-timeout", "nan"], "shutdown_timeout"),
    ],
)
def test_bad_usage_ends_with_code_2_and_says_why(arguments: list[str], said: str) -> None:
    result = jobq("run", *arguments)

    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


# --- exit codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("{}", 0),
        ("{'ok': False}", 1),
        ("PipelineError('first', 'second')", 2),
        ("BackendUnavailable('no such backend: x')", 2),
        ("{'gave_up': 'workers die', 'ok': False}", 3),
        ("OSError(28, 'No space left on device')", 3),
        ("{'unbalanced': 'one is missing', 'signal': 2}", 5),
        ("AssertionError('a slip')", 5),
        ("{'signal': 15, 'ok': False}", 143),
        ("{'signal': 2, 'ok': False}", 130),
        ("KeyboardInterrupt()", 130),
        ("{'stdout_closed': True}", 141),
    ],
)
def test_the_exit_code_says_how_the_run_ended(ending: str, code: int) -> None:
    assert jobq("run", "told.py", "-p", f"ending={ending}").exit_code == code


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("{'gave_up': 'stage parse: 5 workers died'}", "jobq: stage parse: 5 workers died"),
        ("{'unbalanced': 'parse: one is missing'}", "please report it"),
        ("PipelineError('first', 'second')", "jobq: first\nsecond"),
        ("AssertionError('a slip')", "AssertionError: a slip"),
    ],
)
def test_the_reason_is_said_even_when_quiet(ending: str, said: str) -> None:
    assert said in jobq("run", "told.py", "-q", "-p", f"ending={ending}").stderr


def test_the_summary_goes_to_standard_error_unless_quiet() -> None:
    assert "told, run r1: 1.0 s" in jobq("run", "told.py").stderr
    assert jobq("run", "told.py", "-q").stderr == ""


def test_with_output_to_stdout_prints_go_to_standard_error() -> None:
    run = ended("run", "told.py", "-q", "-o", "-")

    assert run.returncode == 0
    assert run.stdout == ""
    assert "output_fd" in json.loads(run.stderr)["others"]


def test_prints_that_nobody_reads_do_not_change_the_exit_code(here: Path) -> None:
    (here / "loud.py").write_text(TOLD + "print('loaded')\n")
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

    run = ended("run", "loud.py", "-q", stdout=writer, env=buffered)
    os.close(writer)

    assert (run.returncode, run.stderr) == (0, "")


def test_output_to_a_closed_stdout_is_refused() -> None:
    line = " ".join([*JOBQ, "run", "told.py", "-o", "-", ">&-"])

    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 2
    assert "standard output" in done.stderr


# --- check and graph -----------------------------------------------------------------------------


def test_check_counts_what_is_right() -> None:
    result = jobq("check", "zoo.py")

    assert (result.exit_code, result.stdout) == (0, "ok: 2 stages, 2 edges\n"), result.stderr


def test_check_as_json_names_stages_and_edges() -> None:
    found = json.loads(jobq("check", "zoo.py", "--json").stdout)

    assert found["ok"] is True
    assert found["problems"] == []
    assert [(s["name"], s["kind"], s["workers"]) for s in found["stages"]] == [
        ("cats", "producer", 1),
        ("purr", "consumer", 2),
    ]
    assert found["edges"] == [{"source": "cats", "target": "purr"}, {"source": "purr", "target": None}]


def test_check_lists_every_problem(here: Path) -> None:
    wrong = "\n@pipeline.consumer\ndef lost(dog: bytes) -> None: ...\n@pipeline.consumer\ndef bare(x): ...\n"
    (here / "wrong.py").write_text(ZOO + wrong)

    result = jobq("check", "wrong.py")
    found = json.loads(jobq("check", "wrong.py", "--json").stdout)

    assert result.exit_code == 2
    assert "lost()" in result.stderr
    assert "bare()" in result.stderr
    assert found["ok"] is False
    assert len(found["problems"]) == 2
    assert jobq("check", "wrong.py", "--json").exit_code == 2


def test_check_of_a_broken_file_is_json_too(here: Path) -> None:
    (here / "broken.py").write_text("import nowhere_at_all\n")

    result = jobq("check", "broken.py", "--json")

    assert result.exit_code == 2
    assert "nowhere_at_all" in json.loads(result.stdout)["problems"][0]


@pytest.mark.parametrize(("form", "start"), [("dot", 'digraph "zoo" {'), ("svg", "<svg ")])
def test_a_graph_is_what_other_programs_draw(form: str, start: str) -> None:
    drawn = jobq("graph", "zoo.py", "--format", form)

    assert drawn.exit_code == 0
    assert drawn.stdout.startswith(start)


def test_a_graph_is_text_or_mermaid() -> None:
    text, mermaid = jobq("graph", "zoo.py"), jobq("graph", "zoo.py", "--format", "mermaid")

    assert "purr()" in text.stdout
    assert mermaid.stdout.startswith("flowchart")
    assert (text.exit_code, mermaid.exit_code) == (0, 0)
    assert jobq("graph", "zoo.py", "--format", "ascii").exit_code == 2


@pytest.mark.parametrize("command", ["check", "graph"])
def test_a_closed_pipe_is_no_traceback(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)

    run = ended(command, "zoo.py", stdout=writer)
    os.close(writer)

    assert run.returncode == 141
    assert run.stderr == ""


# --- whole runs ----------------------------------------------------------------------------------


def test_a_run_writes_its_results_and_nothing_else_to_stdout(here: Path) -> None:
    run = ended("run", "zoo.py", "-o", "-", "-p", "count=4")

    assert run.returncode == 0, run.stderr
    assert sorted(map(json.loads, run.stdout.splitlines())) == ["CAT 0", "CAT 1", "CAT 2", "CAT 3"]
    assert run.stderr.count("printed by a job") == 4
    assert not list(here.glob("*.dead.jsonl"))


def test_a_job_logs_in_the_format_of_the_run() -> None:
    run = ended("run", "zoo.py", "-p", "count=1", stdout=subprocess.DEVNULL)

    lines = [json.loads(line) for line in run.stderr.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["event"] == "purring"]
    assert (line["stage"], line["cat"], line["attempt"], line["level"]) == ("purr", "cat 0", 1, "info")
    assert {"run", "worker", "job", "time"} <= set(line)


def test_a_dead_letter_is_code_1_and_a_line_in_the_default_file(here: Path) -> None:
    run = ended("run", "zoo.py", "-p", "bad=cat 1")

    assert run.returncode == 1
    (file,) = here.glob("zoo-*.dead.jsonl")
    (dead,) = map(json.loads, file.read_text().splitlines())
    assert (dead["stage"], dead["error"], dead["message"]) == ("purr", "ValueError", "cat 1 bites")
    assert dead["item"] == {"name": "cat 1"}
    assert dead["target"] == "zoo.py"
    assert dead["pipeline"] == "zoo"
    assert file.name == f"zoo-{dead['run']}.dead.jsonl"
    assert f"1 dead letter in {file.name}" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "nothing=1"], "nothing"),
        (["-p", "count=many"], "count"),
        (["-b", "carrier-pigeon"], "carrier-pigeon"),
        (["-w", "nobody=2"], "nobody"),
    ],
)
def test_what_cannot_work_is_said_before_it_starts(arguments: list[str], said: str) -> None:
    run = ended("run", "zoo.py", *arguments)

    assert run.returncode == 2
    assert said in run.stderr
    assert "Traceback" not in run.stderr
    assert "printed by a job" not in run.stdout


def test_on_a_terminal_there_is_a_live_line_per_stage() -> None:
    near, far = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}

    with started("run", "zoo.py", "-p", "count=50000", stdout=subprocess.DEVNULL, stderr=far, stdin=far,
                 env=environment) as process:  # fmt: skip
        os.close(far)
        shown = read_all(near)
        process.wait(timeout=60)
    os.close(near)

    assert process.returncode == 0, shown
    assert session_members(process.pid) == []
    assert re.search(r"purr +[\d,]+ +[\d.k]+/s", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown))
    assert "zoo, run" in shown


def test_where_results_go_to_the_terminal_there_is_no_live_line() -> None:
    near, far = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}

    with started("run", "zoo.py", "-p", "count=9000", "-o", "-", stdout=far, stderr=far, stdin=far,
                 env=environment) as process:  # fmt: skip
        os.close(far)
        shown = read_all(near)
        process.wait(timeout=60)
    os.close(near)

    assert process.returncode == 0, shown[-1000:]
    assert "zoo, run" in shown
    assert "\x1b[J" not in shown  # by which the display is cleared


def read_all(descriptor: int) -> str:
    """Return all that comes from a terminal until its other end is closed."""
    parts = []
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            parts.append(os.read(descriptor, 65536))
        except OSError:  # EIO: closed
            break
    return b"".join(parts).decode()


BARE = """
from collections.abc import Iterator
from jobq import Pipeline

pipeline = Pipeline("bare")

@pipeline.producer
def numbers() -> Iterator[int]:
    yield 1

@pipeline.consumer
def same(number: int, db: str) -> int:
    return number

@pipeline.resource
def db() -> str:
    raise ConnectionError("no database\\nat all")
"""


@pytest.mark.parametrize("backend", ["pipe", "thread", "inline"])
def test_a_worker_that_cant_go_on_is_told_in_a_sentence_and_a_traceback_once(
    here: Path, backend: str
) -> None:
    (here / "bare.py").write_text(BARE)

    done = ended("run", "bare.py", "-b", backend, "--log-format", "console")

    sentence = r"worker 1 of stage same( \(pid \d+\))? could not go on: ConnectionError: no database"
    sentence += r", while opening the resource db\(\) \(bare\.py:15\)(;.*)?\n"
    assert re.search(sentence + r"Traceback \(most recent call last\):\n", done.stderr)
    log = done.stderr.partition("\nstage ")[0]
    assert log.count("could not go on: ConnectionError: no database") == 5
    assert log.count("Traceback (most recent call last)") == 1
    assert done.returncode == 3


@pytest.mark.parametrize("target", [".", "no.such.mod:pipeline", "", "nowhere.py", "a b"])
@pytest.mark.parametrize("command", ["run", "check", "graph"])
def test_a_target_that_cant_be_found_is_a_paragraph_and_code_2(command: str, target: str) -> None:
    done = jobq(command, target)

    assert done.exit_code == 2
    assert done.stderr.startswith("jobq: ")
    assert len(done.stderr.splitlines()) <= 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_the_package_itself_is_the_command(start_method: str, here: Path) -> None:
    how: dict[str, Any] = {"cwd": here, "capture_output": True, "text": True, "timeout": 60}
    run = ["run", "zoo.py", "-q", "-o", "-", "--start-method", start_method]

    done = subprocess.run([sys.executable, "-m", "jobq", *run], check=False, **how)

    assert (sorted(done.stdout.splitlines()), done.returncode) == (['"CAT 0"', '"CAT 1"', '"CAT 2"'], 0)


def test_help_imports_nothing_that_only_a_run_needs() -> None:
    code = (
        "import sys, jobq.cli\n"
        "try: jobq.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'pydantic', 'structlog', 'rich', 'multiprocessing', 'jobq.pipeline'} & set(sys.modules))\n"
    )

    output = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60)

    assert output.startswith("Usage:")
    assert output.splitlines()[-1] == "set()"
