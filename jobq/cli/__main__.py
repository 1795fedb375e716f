"""``python -m jobq.cli`` and the script ``jobq``."""

from __future__ import annotations

import signal

from jobq.cli import main


def command() -> None:
    """Be the command ``jobq``, which no Ctrl-C interrupts any more when it has come to its end."""
    try:
        main(prog_name="jobq")
    finally:
        # The interpreter takes some milliseconds to end, and would show where it was struck in them. Not
        # SIG_IGN: a strike that Python has not handled yet would be reported as lost.
        signal.signal(signal.SIGINT, lambda *_: None)


if __name__ == "__main__":
    command()
