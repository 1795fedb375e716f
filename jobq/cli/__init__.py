"""
The command ``jobq``.

Only click is imported before a command runs, so that ``jobq --help`` answers at once.
"""

from __future__ import annotations

from typing import Any

import click

from jobq.cli.check import check, graph
from jobq.cli.dead import dead
from jobq.cli.ending import end_interrupted
from jobq.cli.run import run


class _Commands(click.Group):
    """Ends with the code of Ctrl-C where click would say that it aborted, with the code of dead letters."""

    def invoke(self, ctx: click.Context) -> Any:  # Any: what a command returns
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            end_interrupted()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jobq")
def main() -> None:
    """
    Run pipelines of typed producers and consumers.

    TARGET is pipeline.py, pipeline.py:variable or package.module:variable.
    """


main.add_command(run)
main.add_command(check)
main.add_command(graph)
main.add_command(dead)

__all__ = ["main"]
