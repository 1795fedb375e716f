"""``python -m jobq``: the command ``jobq``."""

from __future__ import annotations

from jobq.cli.__main__ import command

if __name__ == "__main__":
    command()
