"""The short form of `soak.py`, whose long form runs outside CI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_run import PROCESSES


@pytest.mark.slow
@pytest.mark.parametrize("backend", PROCESSES)
def test_runs_at_full_speed_stand_kills_of_their_processes(backend: str) -> None:
    script = Path(__file__).with_name("soak.py")
    options = ["--seconds", "3", "--round", "1", "--keepers", "1", "--backend", backend]

    soak = subprocess.run(
        [sys.executable, script, *options], check=False, capture_output=True, text=True, timeout=110
    )

    assert soak.returncode == 0, soak.stdout + soak.stderr
    assert "NOT RIGHT" not in soak.stdout
