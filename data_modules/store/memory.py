"""How much RAM this process may still take: of the machine, and of the control groups that it is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

GROUPS = "sys/fs/cgroup"
# where each version of control groups says its bound, what is used, and which of that can be dropped at once
FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_ram(system: Path = Path("/")) -> int | None:
    """Bytes that can be had: a container or a batch job often gets less than the machine has.

    Args:
        system: Where ``proc`` and ``sys`` lie.

    Returns:
        The least of what the machine and each control group leave; None where nothing can be asked.
    """
    return min((*_machine(system), *_groups(system)), default=None)


def _machine(system: Path) -> Iterator[int]:
    with suppress(OSError, ValueError, IndexError):
        for line in (system / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _groups(system: Path) -> Iterator[int]:
    with suppress(OSError):
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, version = system / GROUPS, 2
            elif "memory" in controllers.split(","):
                root, version = system / GROUPS / "memory", 1
            else:
                continue
            inner = PurePosixPath(path.lstrip("/"))
            for part in (inner, *inner.parents):  # a group is bound by those around it, too
                yield from _group(root / part, *FILES[version])


def _group(folder: Path, bound: str, used: str, droppable: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # no such file, or no bound: "max"
        limit, taken = (int((folder / name).read_text()) for name in (bound, used))
        cached = 0
        with suppress(OSError, ValueError, IndexError):
            for line in (folder / "memory.stat").read_text().splitlines():
                if line.split()[0] == droppable:
                    cached = int(line.split()[1])
        yield max(0, limit - max(0, taken - cached))
