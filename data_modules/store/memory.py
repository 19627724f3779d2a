"""RAM available to this process, within the limits of the machine and of its control groups (cgroups)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

GROUPS = "sys/fs/cgroup"
# files of each cgroup version: the limit, the current usage, and the field of memory.stat for reclaimable cache
FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_ram(system: Path = Path("/")) -> int | None:
    """Return the available memory in bytes; a container or a batch job often gets less than the machine has.

    Args:
        system: Folder that contains ``proc`` and ``sys``.

    Returns:
        The minimum over the machine and all enclosing control groups; None if none of them can be read.
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
            for part in (inner, *inner.parents):  # the limits of parent groups apply, too
                yield from _group(root / part, *FILES[version])


def _group(folder: Path, bound: str, used: str, droppable: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # no such file, or no limit: "max"
        limit, taken = (int((folder / name).read_text()) for name in (bound, used))
        cached = 0
        with suppress(OSError, ValueError, IndexError):
            for line in (folder / "memory.stat").read_text().splitlines():
                if line.split()[0] == droppable:
                    cached = int(line.split()[1])
        yield max(0, limit - max(0, taken - cached))
