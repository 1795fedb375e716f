"""What the tests of faults share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.programs import Program


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    """A folder for one pipeline file; nothing that was started for it outlives the test."""
    program = Program(tmp_path)
    yield program
    program.close()
