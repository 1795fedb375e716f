"""``python -m jobq.cli`` is ``jobq``."""

from jobq.cli import main

main(prog_name="jobq")
