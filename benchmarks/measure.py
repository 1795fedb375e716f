"""
One measurement, in a process of its own: prints "begin", and at the end a line of JSON.

    python -m benchmarks.measure WORKLOAD CONTESTANT COUNT [CHUNK]
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
from typing import Any

from benchmarks.contestant import Cannot, contestant
from benchmarks.workloads import WORKLOADS, Wrong


def measure(workload: str, name: str, count: int, chunk: int = 0) -> dict[str, Any]:
    """Return ``value``, ``seconds`` and ``cpu`` seconds; or why there are none: ``absent, cannot, wrong``."""
    try:
        measured = contestant(name)
    except ImportError as error:
        return {"absent": str(error)}
    load = WORKLOADS[workload].load(count, chunk)
    for _ in load.items(count):  # what is kept is made now
        pass
    try:
        measured.prepare(load)
        # imports are not what is measured, and some come late, with the first run
        WORKLOADS[workload].read(measured, WORKLOADS[workload].load(2))
        gc.freeze()  # what is there is nobody's garbage: no contestant shall pay for looking at it
        print("begin", flush=True)
        before = cpu_seconds()
        reading = WORKLOADS[workload].read(measured, load)
        cpu = cpu_seconds() - before
        measured.close()
    except Cannot as error:
        return {"cannot": str(error)}
    except Wrong as error:
        return {"wrong": str(error)}
    return {"value": reading.value, "seconds": reading.seconds, "cpu": cpu, "count": count}


def cpu_seconds() -> float:
    """Return the CPU seconds used by this process and those of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    """Measure what the command line asks for."""
    workload, name, *sizes = sys.argv[1:]
    print(json.dumps(measure(workload, name, *map(int, sizes))), flush=True)
    # A peer may leave threads and processes that would hold up the end; none of them is measured any more.
    os._exit(0)


if __name__ == "__main__":
    main()
