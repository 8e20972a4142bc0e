"""Counting cores: affinity and the quotas of both generations of control groups."""

import os

import pytest

from provider_image.cores import available_cores

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
