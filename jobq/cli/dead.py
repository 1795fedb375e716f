"""``jobq dead``: what is in a file of dead letters, and running them again."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobq.cli.ending import FAILED, exit_code, explained, flush_stdout, print_out, say
from jobq.cli.run import claim_stdout, conclude, execute, occupy_standard_streams, read_options, run

if TYPE_CHECKING:
    from jobq.options import RunOptions
    from jobq.replay import Letter
    from jobq.report import Report

_FILE = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))

#: The columns that always have the same width.
_FIXED = {"#": 4, "stage": 12, "job": 6, "status": 9}
#: So much of an item is looked at for its cell of the table.
_ENOUGH = 400


@click.group()
def dead() -> None:
    """
    Read dead letters, and run them again.

    FILE is what a run wrote for the jobs that it gave up, a JSON line each. It is data, not code: to read
    one runs nothing.
    """


# ── list, show ───────────────────────────────────────────────────────────────


@dead.command("list")
@_FILE
def list_letters(file: Path) -> None:
    """List the letters of FILE, a line each: the number is that of the line in FILE."""
    with explained():
        table = _Table(shutil.get_terminal_size().columns)
        bad = 0
        for number, letter in _letters(file):
            if not isinstance(letter, str):
                print_out(table.row(number, letter))
            bad += isinstance(letter, str)
    sys.exit(FAILED if bad else 0)


@dead.command()
@_FILE
@click.argument("number", type=click.IntRange(min=1), required=False, metavar="[N]")
def show(file: Path, number: int | None) -> None:
    """Show all that is known of the letters of FILE, or only of the one in line N."""
    with explained():
        shown, bad = 0, False
        for line, letter in _letters(file, number):
            bad |= isinstance(letter, str)
            if not isinstance(letter, str):
                print_out(("\n" if shown else "") + _in_full(line, letter))
                shown += 1
        if number is not None and not shown and not bad:
            raise click.BadParameter(f"{file} has no letter in line {number}.", param_hint="N")
    sys.exit(FAILED if bad else 0)


def _letters(file: Path, only: int | None = None) -> Iterator[tuple[int, Letter | str]]:
    """Yield the letters by line; what is none is said, and yielded as text."""
    from jobq.failure import visible
    from jobq.replay import NoLetter, read_file

    empty = True
    for number, letter in read_file(file):
        empty = False
        if only is not None and number != only:
            if number > only:
                return
            continue
        if isinstance(letter, NoLetter):
            say(f"{file}, line {number} is no dead letter: {visible(letter.problem)}")
            yield number, letter.problem
        else:
            yield number, letter
    if empty and only is None:
        say(f"{file} is empty: no dead letters")


class _Table:
    """Rows of the same widths, so that a file of any length can be listed as it is read."""

    def __init__(self, width: int) -> None:
        rest = max(30, width - sum(_FIXED.values()) - len(_FIXED) - 1)
        self._widths = [*_FIXED.values(), rest * 3 // 5, rest - rest * 3 // 5]
        self._began = False

    def row(self, number: int, letter: Letter) -> str:
        """Return a letter's row, the first one with the head of the table."""
        message = letter.message.strip().partition("\n")[0]
        cells = [number, letter.stage, "" if letter.job is None else letter.job, letter.status,
                 f"{letter.error}: {message}" if letter.error and message else letter.error or message,
                 _item_line(letter)]  # fmt: skip
        rows = [[*_FIXED, "error", "item"]] * (not self._began) + [cells]
        self._began = True
        return "\n".join(map(self._line, rows))

    def _line(self, cells: list[Any]) -> str:
        from jobq.failure import visible

        cut = (
            text if len(text) <= width else text[: width - 1] + "…"
            for text, width in zip((visible(str(cell)) for cell in cells), self._widths, strict=True)
        )
        return " ".join(text.ljust(width) for text, width in zip(cut, self._widths, strict=True)).rstrip()


def _item_line(letter: Letter) -> str:
    if letter.item is not None:
        return json.dumps(letter.item, ensure_ascii=False)[:_ENOUGH]
    return f"({letter.item_type or 'an item'}, pickled)" if letter.item_pickle is not None else "-"


def _in_full(line: int, letter: Letter) -> str:
    """Return everything that is known of *letter* as text that a terminal only shows."""
    tries = f"{letter.attempts} attempt{'s' * (letter.attempts != 1)}"
    hands = f"{letter.deliveries} deliver{'y' if letter.deliveries == 1 else 'ies'}"
    facts = {
        "letter": f"{line}",
        "stage": letter.stage,
        "job": letter.job,
        "key": letter.key,
        "status": f"{letter.status} after {tries}, {hands}",
        "error": letter.error,
        "message": letter.message,
        "time": letter.time.isoformat(),
        "run": letter.run,
        "pipeline": letter.pipeline,
        "target": letter.target,
        "item type": letter.item_type,
    }
    told = [f"{name:<10}{_block(str(fact))}" for name, fact in facts.items() if fact not in (None, "")]
    if letter.item is not None:
        told += ["item", _block("\n" + json.dumps(letter.item, ensure_ascii=False, indent=2)).lstrip("\n")]
    elif letter.item_pickle is not None:
        told.append(f"{'item':<10}pickled, {len(letter.item_pickle) * 3 // 4:,} bytes")
    if letter.traceback:
        told += ["traceback", _block("\n" + letter.traceback.rstrip("\n")).lstrip("\n")]
    return "\n".join(told)


def _block(text: str) -> str:
    """Return *text* with its line breaks kept, all others escaped, and every line but the first indented."""
    from jobq.failure import visible

    first, *others = (visible(line.replace("\t", "    ")) for line in text.split("\n"))
    return "\n".join([first, *textwrap.indent("\n".join(others), "  ").split("\n")] if others else [first])


# ── replay ───────────────────────────────────────────────────────────────────


@dead.command()
@_FILE
@click.option("--target", help="The pipeline.  [default: the letters' own, a file below this folder]")
@click.option("--inline", is_flag=True, help="Run in this process, so that breakpoint() works.")
@click.option("--pdb", is_flag=True, help="Open the debugger where a job raises; implies --inline.")
@click.option("--unsafe-pickle", is_flag=True, help="Load pickled items: whoever wrote FILE can run code.")
def replay(
    file: Path,
    target: str | None,
    inline: bool,
    pdb: bool,
    unsafe_pickle: bool,
    params: dict[str, str],
    quiet: bool,
    verbose: bool,
    **given: Any,
) -> None:
    """
    Run the letters of FILE again: each enters at its stage and goes on downstream.

    The options are those of jobq run, and so are the exit codes; 1 too if letters were left out. What dies
    again goes to a new file.
    """
    with explained():
        from jobq.load import load_target
        from jobq.replay import own_target, plan_replay, survey
        from jobq.report import counted

        if inline or pdb:
            _stay_here(given)
        contents = survey(file)
        if not contents.letters:
            say(f"{file} is empty: no dead letters")
            sys.exit(0)
        target = target or own_target(contents)
        occupy_standard_streams()
        output_fd = claim_stdout(given)
        loaded = load_target(target)
        plan = plan_replay(contents, loaded.pipeline.graph(params), unsafe_pickle=unsafe_pickle)
        options = read_options(given, loaded.pipeline.run_options, output_fd, quiet=quiet, verbose=verbose)
        _keep_apart(file, options)
        if not quiet:
            say(f"replaying {counted(plan.entering, 'letter')} of {file} with {target}")
        for what in plan.left_out:
            say(f"left out: {what}")
        on_error = _post_mortem() if pdb else None
        outcome = execute(loaded, options, params, output_fd, source=plan.source, on_error=on_error)
        conclude(outcome, options, quiet=quiet)
        if not quiet and options.output is None:
            _tell_of_unwritten(outcome.report)
    flush_stdout()
    sys.exit(exit_code(outcome) or (FAILED if plan.left_out else 0))


# Whatever else a run takes: but the letters are its input.
replay.params += [option for option in run.params if option.name not in ("target", "input")]


def _stay_here(given: dict[str, Any]) -> None:
    """Have the jobs run in this thread, with the terminal to themselves."""
    asked = click.get_current_context().get_parameter_source("backend")
    if asked is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError(f"--inline and --pdb run in this process: leave out -b {given['backend']}.")
    given["backend"] = "inline"
    if given["progress"] is None:
        given["progress"] = False


def _keep_apart(file: Path, options: RunOptions) -> None:
    """Refuse to write into the file that is read."""
    from jobq.options import dead_letter_path

    for option, path in (("--dead-letters", options.dead_letters), ("--output", options.output)):
        written = None if path is None else dead_letter_path(path, pipeline="", run="")
        if written is not None and written.exists() and written.samefile(file):
            raise click.UsageError(f"{option} is {file} itself, which is being read: name another file.")


def _tell_of_unwritten(report: Report) -> None:
    """Say that results went nowhere, if there were any: whoever replays mostly wants them."""
    from jobq.report import counted

    results = sum(edge.received for edge in report.edges if edge.target is None)
    if results:
        say(f"{counted(results, 'result')} went nowhere: with -o FILE results are written.")


def _post_mortem() -> Callable[[str, int, BaseException], None]:
    """Return what opens the debugger where a job raised, the first time that it did."""
    from bdb import BdbQuit
    from pdb import Pdb

    from jobq.errors import Reject, Retry, Skip
    from jobq.failure import safe_text, users_frames, visible

    seen: set[tuple[str, int]] = set()

    def look(stage: str, job: int, error: BaseException) -> None:
        trace = users_frames(error)
        meant = isinstance(error, Retry | Reject | Skip | BdbQuit)
        if trace is None or meant or (stage, job) in seen:
            return
        seen.add((stage, job))
        say(f"{stage}, job {job}: {type(error).__name__}: {visible(safe_text(error))}")
        debugger = Pdb(nosigint=True)  # Ctrl-C stays the run's
        debugger.reset()
        debugger.interaction(None, trace)

    return look
