"""``jobq run``: the options of a run from the command line and the environment, and its exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from jobq.cli.ending import exit_code, explained, flush_stdout, say

if TYPE_CHECKING:
    from jobq.load import Loaded
    from jobq.options import RunOptions, Workers
    from jobq.outcome import Outcome
    from jobq.report import Report

_Command = TypeVar("_Command", bound=Callable[..., Any])

_INPUT = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
_DEAD_LETTERS = click.Path(dir_okay=False, writable=True, path_type=Path)
_OUTPUT = click.Path(dir_okay=False, writable=True, allow_dash=True, path_type=Path)


def _option(*names: str, **settings: Any) -> Callable[[_Command], _Command]:
    """Return a click option that an environment variable named after its long form can give."""
    long = next(name for name in names if name.startswith("--")).partition("/")[0]
    variable = "JOBQ_" + long.removeprefix("--").replace("-", "_").upper()
    return click.option(*names, envvar=variable, show_envvar=True, **settings)


def _read_params(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    params = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{text!r} is not NAME=VALUE.")
        params[name] = value
    return params


def _read_workers(
    _: click.Context, __: click.Parameter, given: tuple[str, ...]
) -> Workers | dict[str, Workers] | None:
    by_stage: dict[str, Workers] = {}
    for text in given:
        stage, _equals, count = text.rpartition("=")
        if count == "auto":
            by_stage[stage] = "auto"
            continue
        if not count.isascii() or not count.isdigit() or int(count) < 1:
            raise click.BadParameter(f"{text!r} is neither N nor STAGE=N, with N at least 1, or auto.")
        by_stage[stage] = int(count)
    if "" in by_stage and len(by_stage) > 1:
        raise click.BadParameter("give either N for all consumers or STAGE=N for some, not both.")
    return by_stage.get("", by_stage or None)


def _in_a_folder(_: click.Context, __: click.Parameter, given: Path | None) -> Path | None:
    if given is not None and not given.parent.is_dir():
        raise click.BadParameter(f"there is no folder {given.parent}.")
    return given


@click.command()
@click.argument("target")
@_option(
    "-p", "--param", "params", multiple=True, metavar="NAME=VALUE", callback=_read_params,
    help="A parameter of the run. Repeatable.",
)  # fmt: skip
@_option("-b", "--backend", metavar="NAME", help="How workers run and are reached.  [default: joinable]")
@_option(
    "--start-method", type=click.Choice(["auto", "fork", "forkserver", "spawn"]),
    help="How processes are started.  [default: auto]",
)  # fmt: skip
@_option(
    "-w", "--workers", multiple=True, metavar="N|STAGE=N", callback=_read_workers,
    help="Consumers' workers, for all or by stage; auto: a share of the cores. Repeatable.",
)  # fmt: skip
@_option(
    "--input", type=_INPUT, metavar="FILE|-", help="JSON lines in place of the producers (-: standard input)."
)
@_option(
    "-o",
    "--output",
    type=_OUTPUT,
    metavar="FILE|-",
    callback=_in_a_folder,
    help="Results as JSON lines (-: standard output).",
)
@_option("-x", "--fail-fast", is_flag=True, default=None, help="Start nothing new after a dead letter.")
@_option("--max-failures", type=click.IntRange(min=1), help="Start nothing new after so many dead letters.")
@_option(
    "--dead-letters", type=_DEAD_LETTERS, metavar="FILE", callback=_in_a_folder,
    help="Dead letters as JSON lines.  [default: PIPELINE-RUNID.dead.jsonl]",
)  # fmt: skip
@_option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
    help="How long the run may take; then it gives up, and what is unfinished is cancelled.",
)  # fmt: skip
@_option(
    "--shutdown-timeout", type=click.FloatRange(min=0), metavar="SECONDS",
    help="How long a stop may take to finish what was begun.  [default: 30]",
)  # fmt: skip
@_option("--progress/--no-progress", default=None, help="A live line per stage.  [default: on a terminal]")
@_option("-q", "--quiet", is_flag=True, help="Errors only.")
@_option("-v", "--verbose", is_flag=True, help="Debug messages too.")
@_option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error", "critical"]),
    help="[default: info]",
)  # fmt: skip
@_option(
    "--log-format", type=click.Choice(["console", "json"]),
    help="[default: console on a terminal, else json]",
)  # fmt: skip
def run(target: str, params: dict[str, str], quiet: bool, verbose: bool, **given: Any) -> None:
    """Run the pipeline TARGET."""
    with explained():
        from jobq.load import load_target

        occupy_standard_streams()
        output_fd = claim_stdout(given)
        loaded = load_target(target)
        options = read_options(given, loaded.pipeline.run_options, output_fd, quiet=quiet, verbose=verbose)
        outcome = execute(loaded, options, params, output_fd)
        conclude(outcome, options, quiet=quiet)
    flush_stdout()
    sys.exit(exit_code(outcome))


def read_options(
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    output_fd: int | None,
    *,
    quiet: bool,
    verbose: bool,
) -> RunOptions:
    """
    Return the options of the run: what was given, else the pipeline's defaults, else our own.

    *output_fd* is where results go, if to what was standard output.
    """
    from jobq.observe.log import is_terminal
    from jobq.options import DEFAULT_NAME, read_run_options

    terminal = is_terminal(sys.stderr)
    usual = {
        "log_level": "info",
        "log_format": "console" if terminal else "json",
        "dead_letters": Path(DEFAULT_NAME),
        # On one terminal with the results it would leave its traces between them.
        "progress": output_fd is None or not os.isatty(output_fd),
    }
    stated = {name: value for name, value in given.items() if value is not None}
    if quiet or verbose:
        stated.setdefault("log_level", "error" if quiet else "debug")
    options = usual | dict(defaults) | stated
    options["progress"] = options["progress"] and terminal and not quiet
    options.pop("collect", None)  # nobody here could take them
    return read_run_options(options)


def occupy_standard_streams() -> None:
    """
    Let the numbers 0, 1 and 2 be open files, if only /dev/null.

    Else a channel or a file gets the number of a stream that was closed, and what users' code, or a library,
    writes to the stream goes there.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, so this one


def claim_stdout(given: Mapping[str, Any]) -> int | None:
    """
    Return a descriptor for what was standard output if results go there: it is standard error from now on.

    So what users' code prints, here and in workers, can't get between the results.
    """
    if given["output"] != Path("-"):
        return None
    try:
        sys.stdout.flush()
        claimed = os.dup(1)
        os.dup2(2, 1)
    except (OSError, AttributeError) as error:
        raise click.UsageError("-o - needs a standard output, and it is closed.") from error
    return claimed


def execute(
    loaded: Loaded, options: RunOptions, params: dict[str, str], output_fd: int | None, **how: Any
) -> Outcome:
    """Run the pipeline, observed as *options* say; *how* is for `Pipeline.execute`."""
    from jobq.observe import observing

    with observing(options) as observers:
        outcome: Outcome = loaded.pipeline.execute(
            options,
            dict(params),
            texts=True,
            observers=observers,
            preload=loaded.preload,
            target=loaded.target,
            output_fd=output_fd,
            **how,
        )
    return outcome


def _dead_letters(options: RunOptions, report: Report) -> Path | None:
    """Return the file of dead letters, if there is one, as short as it can be from the current folder."""
    from jobq.options import dead_letter_path

    assert options.dead_letters is not None  # the command line has a default
    try:
        file = dead_letter_path(options.dead_letters, pipeline=report.pipeline, run=report.run)
        if not file.exists():
            return None
        return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    except FileNotFoundError:  # a job has removed the current folder
        return None


def conclude(outcome: Outcome, options: RunOptions, *, quiet: bool) -> None:
    """Say what became of the run on standard error."""
    from jobq.observe.summary import summary
    from jobq.observe.text import write

    report = outcome.report
    if not quiet:
        write(sys.stderr, summary(report, _dead_letters(options, report)) + "\n")
    if outcome.gave_up is not None:
        say(outcome.gave_up)
    if outcome.unbalanced is not None:
        say(f"{outcome.unbalanced}\n  The books don't balance: a bug in jobq, please report it.")
