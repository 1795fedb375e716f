"""Whether the kernel has killed for want of memory: its count for the control group that we are in."""

from __future__ import annotations

from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")


def events_file() -> Path | None:
    """Return the file with the kernel's counts for our control group, or None where there is none."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, kinds, group = line.split(":", 2)
        if kinds == "":
            file = _MOUNT / group.lstrip("/") / "memory.events"
        elif "memory" in kinds.split(","):
            file = _MOUNT / "memory" / group.lstrip("/") / "memory.oom_control"
        else:
            continue
        if file.is_file():
            return file
    return None


class OutOfMemory:
    """Tells deaths that the kernel's count of such kills explains, each kill once."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._explained = self._count()

    def explains_a_death(self) -> bool:
        """Return whether the count has grown by more than the deaths that were explained already."""
        if self._count() <= self._explained:
            return False
        self._explained += 1
        return True

    def _count(self) -> int:
        if self._file is None:
            return 0
        try:
            lines = self._file.read_text().splitlines()
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
        except (OSError, ValueError, IndexError):
            return 0
