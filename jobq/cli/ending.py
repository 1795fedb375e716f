"""How a command ends: the exit codes, and every error as text instead of a traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from jobq.outcome import Outcome

FAILED = 1
USAGE = 2
GAVE_UP = 3
UNBALANCED = 5
SIGNALLED = 128
STDOUT_CLOSED = SIGNALLED + signal.SIGPIPE


def exit_code(outcome: Outcome) -> int:
    """Return the exit code for *outcome*: the worst that can be said of it."""
    if outcome.unbalanced is not None:
        return UNBALANCED
    if outcome.stdout_closed:
        return STDOUT_CLOSED
    if outcome.signal is not None:
        return SIGNALLED + outcome.signal
    if outcome.gave_up is not None:
        return GAVE_UP
    return 0 if outcome.report.ok else FAILED


def say(text: str) -> None:
    """Write *text* to standard error as a message of jobq's; never raises."""
    from jobq.observe.text import write

    write(sys.stderr, f"jobq: {text}\n")


def print_out(text: str) -> None:
    """Write *text* to standard output now, so that a closed one is seen here."""
    if sys.stdout is None:
        raise OSError("standard output is closed")
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


def end_interrupted() -> NoReturn:
    """End the command as one that Ctrl-C ended; a key that is held down strikes again meanwhile."""
    with suppress(KeyboardInterrupt):
        say("interrupted")
    sys.exit(SIGNALLED + signal.SIGINT)


@contextmanager
def explained() -> Iterator[None]:
    """End the command with the exit code and the message of an error that leaves the ``with``."""
    import click

    from jobq.errors import BackendUnavailable, PipelineError

    try:
        yield
    except (click.ClickException, click.exceptions.Exit):
        raise
    except (PipelineError, BackendUnavailable) as error:
        say(str(error))
        sys.exit(USAGE)
    except BrokenPipeError:
        silence_stdout()
        sys.exit(STDOUT_CLOSED)
    except KeyboardInterrupt:
        end_interrupted()
    except OSError as error:
        say(str(error))
        sys.exit(GAVE_UP)
    except Exception:
        import traceback

        say(f"a bug in jobq, please report it:\n{traceback.format_exc()}")
        sys.exit(UNBALANCED)


def flush_stdout() -> None:
    """Write out what was printed here, if somebody reads it: the interpreter's own try would be noisy."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):  # nobody reads it, closed, or never there
        silence_stdout()


def silence_stdout() -> None:
    """Let standard output go nowhere: nobody reads it, and the interpreter will flush it at its end."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
