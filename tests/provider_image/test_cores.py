"""Counting cores: affinity and the quotas of both generations of control groups."""

import os

import pytest

from provider_image import cores as cores_module
from provider_image.cores import available_cores, available_memory_bytes, default_processes, threads_per_process

HERE = len(os.sched_getaffinity(0))


def write(root, **files: str):
    """Write files below a root; `__` in a name is a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_control_groups_affinity_counts(tmp_path):
    assert available_cores(tmp_path) == HERE


def test_affinity_of_this_process_counts():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def quota(root, cores: float, kind: str, folder: str):
    path = root / folder
    path.mkdir(parents=True)
    if kind == "v2":
        (path / "cpu.max").write_text(f"{int(cores * 100000)} 100000\n")
    else:
        (path / "cpu.cfs_quota_us").write_text(f"{int(cores * 100000)}\n")
        (path / "cpu.cfs_period_us").write_text("100000\n")


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (0.5, 1), (1.5, min(2, HERE)), (1000, HERE)])
@pytest.mark.parametrize(
    ("kind", "membership", "folder"),
    [
        ("v2", "0::/\n", "sys/fs/cgroup"),
        ("v2", "0::/system/mlg\n", "sys/fs/cgroup/system/mlg"),
        ("v2", "0::/system/mlg\n", "sys/fs/cgroup/system"),
        ("v2", "0::/docker/abc\n", "sys/fs/cgroup"),
        ("v1", "4:cpu,cpuacct:/docker/abc\n", "sys/fs/cgroup/cpu,cpuacct"),
        ("v1", "4:memory:/x\n1:cpu:/a\n0::/\n", "sys/fs/cgroup/cpu/a"),
    ],
)
def test_quota_counts_wherever_it_stands(tmp_path, kind, membership, folder, cores, expected):
    write(tmp_path, proc__self__cgroup=membership)
    quota(tmp_path, cores, kind, folder)

    assert available_cores(tmp_path) == expected


@pytest.mark.parametrize("text", ["max 100000\n", "", "rubbish", "0 0"])
def test_no_quota_is_no_limit(tmp_path, text):
    write(tmp_path, proc__self__cgroup="0::/\n", **{"sys__fs__cgroup__cpu.max": text})

    assert available_cores(tmp_path) == HERE


MEMINFO = "MemTotal:       2048 kB\nMemFree:        1024 kB\n"


@pytest.mark.parametrize(
    ("membership", "file", "text", "expected"),
    [
        ("0::/\n", "sys/fs/cgroup/memory.max", "1048576\n", 1 << 20),
        ("0::/docker/abc\n", "sys/fs/cgroup/docker/memory.max", "1048576\n", 1 << 20),
        ("9:memory:/x\n", "sys/fs/cgroup/memory/x/memory.limit_in_bytes", "1048576\n", 1 << 20),
        ("0::/\n", "sys/fs/cgroup/memory.max", "max\n", 2 << 20),
        ("9:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2**63 - 4096}\n", 2 << 20),
        ("4:cpu:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes", "1048576\n", 2 << 20),
    ],
)
def test_memory_is_that_of_the_machine_or_of_the_container(tmp_path, membership, file, text, expected):
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=membership)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)

    assert available_memory_bytes(tmp_path) == expected


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(1, 1, 1), (2, 2, 1), (8, 8, 1), (9, 5, 2), (12, 6, 2), (20, 7, 3), (64, 8, 8)]
)
def test_few_processes_share_many_cores(monkeypatch, cores, processes, threads):
    monkeypatch.setattr(cores_module, "available_cores", lambda: cores)

    assert (default_processes(), threads_per_process(processes)) == (processes, threads)


def test_no_core_is_idle_if_the_number_of_processes_is_given(monkeypatch):
    monkeypatch.setattr(cores_module, "available_cores", lambda: 12)

    assert [threads_per_process(processes) for processes in (1, 5, 8, 12, 16)] == [12, 3, 2, 1, 1]
