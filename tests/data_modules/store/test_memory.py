"""Available memory of a machine, of a job's control group, and of its parent groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_modules.store.memory import free_ram

V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def write(folder: Path, names: tuple[str, str, str], bound: object, used: int, droppable: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{bound}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {droppable}\nfile 7\n")


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A machine with 8,192 bytes and no control group."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 16 kB\nMemAvailable:       8 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("")
    return tmp_path


def test_a_machine_leaves_what_it_has(system: Path) -> None:
    assert free_ram(system) == 8192


def test_nothing_is_known_where_nothing_can_be_asked(tmp_path: Path) -> None:
    assert free_ram(tmp_path) is None


def test_a_job_gets_what_its_groups_leave(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("0::/slurm/job_1/step_0\n")
    groups = system / "sys/fs/cgroup"
    write(groups / "slurm/job_1/step_0", V2, "max", 900)
    assert free_ram(system) == 8192
    write(groups / "slurm/job_1", V2, 1000, 900, droppable=300)
    assert free_ram(system) == 400
    write(groups / "slurm", V2, 2000, 1900)
    assert free_ram(system) == 100
    write(groups / "slurm", V2, 2000, 2100)
    assert free_ram(system) == 0


def test_the_older_control_groups_are_asked_too(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("5:cpu,cpuacct:/\n4:hugetlb,memory:/docker/a:b\n0::/\n")
    write(system / "sys/fs/cgroup/memory/docker/a:b", V1, 5000, 4000, droppable=250)
    assert free_ram(system) == 1250
    (system / "sys/fs/cgroup/memory/docker/a:b/memory.stat").unlink()
    assert free_ram(system) == 1000


def test_what_cannot_be_read_is_no_bound(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("0::/gone\n")
    assert free_ram(system) == 8192
