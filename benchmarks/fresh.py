"""What the benchmarks share: a measurement in a process of its own, and a line that says where it ran."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def in_fresh_process(script: str, *arguments: object) -> dict[str, Any]:
    """Return the JSON that *script* prints when a new Python runs it; ends with its error if it fails."""
    argv = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, timeout=600, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def machine() -> str:
    """Return a line that describes this machine, with its load: other programs' work spoils the numbers."""
    cpu = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    load = os.getloadavg()[0]
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, load {load:.1f} at the start"
    )
