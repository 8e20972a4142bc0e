"""Counting cores: affinity and the quotas of both generations of control groups."""

import contextlib
import os
import resource
import threading

import pytest

from provider_image.cores import (
    AllocationLimit,
    MemoryBudget,
    Share,
    available_cores,
    available_memory_bytes,
    default_decoders,
    default_processes,
    divide_cores,
    format_cores,
    parse_cores,
)
from tests.timing import DEADLINE_SECONDS, wait_until

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
        ("0::/mlg.service\n", "sys/fs/cgroup/mlg.service/memory.high", "1048576\n", 1 << 20),
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


def machine(monkeypatch, root, *, nodes: list[str], quota: str = "max 100000\n", memory: int = 1 << 40):
    """Write the files of a machine or container with the cores of these nodes, of which this process may use all."""
    cores = frozenset().union(*map(parse_cores, nodes))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cores))
    write(root, proc__meminfo=f"MemTotal: {memory >> 10} kB\n", proc__self__cgroup="0::/\n")
    write(root, **{"sys__fs__cgroup__cpu.max": quota})
    for number, text in enumerate(nodes):
        write(root, **{f"sys__devices__system__node__node{number}__cpulist": f"{text}\n"})
    return root


def cores_of(count: int) -> list[str]:
    return [f"0-{count - 1}"]


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(1, 1, 1), (2, 2, 1), (8, 8, 1), (9, 5, 2), (12, 6, 2), (20, 7, 3), (64, 8, 8)]
)
def test_few_processes_share_many_cores(monkeypatch, tmp_path, cores, processes, threads):
    root = machine(monkeypatch, tmp_path, nodes=cores_of(cores))

    assert default_processes(root) == processes
    assert divide_cores(processes, root) == [Share(threads=threads)] * processes


def test_no_core_is_idle_if_the_number_of_processes_is_given(monkeypatch, tmp_path):
    root = machine(monkeypatch, tmp_path, nodes=cores_of(12))

    assert [divide_cores(processes, root)[0].threads for processes in (1, 5, 8, 12, 16)] == [12, 3, 2, 1, 1]


@pytest.mark.parametrize("nodes", [["0-63"], ["0-31", "32-63"]], ids=["one node", "two nodes"])
def test_container_with_two_of_64_cores_gets_two_processes_of_one_thread(monkeypatch, tmp_path, nodes):
    root = machine(monkeypatch, tmp_path, nodes=nodes, quota="200000 100000\n")

    processes = default_processes(root)

    assert [share.threads for share in divide_cores(processes, root)] == [1, 1]


@pytest.mark.parametrize(
    ("megabytes", "processes", "threads", "decoders"), [(256, 1, 64, 1), (1024, 2, 32, 3), (2048, 4, 16, 6)]
)
def test_little_memory_means_fewer_processes_with_more_threads(
    monkeypatch, tmp_path, megabytes, processes, threads, decoders
):
    root = machine(monkeypatch, tmp_path, nodes=cores_of(64))
    write(root, **{"sys__fs__cgroup__memory.max": f"{megabytes << 20}\n"})

    assert default_processes(root) == processes
    assert {share.threads for share in divide_cores(processes, root)} == {threads}
    assert default_decoders(root) == decoders


def test_each_process_gets_the_cores_of_one_node(monkeypatch, tmp_path):
    root = machine(monkeypatch, tmp_path, nodes=["0-3,8-11", "4-7", ""])

    shares = divide_cores(default_processes(root), root)

    big, small = frozenset({0, 1, 2, 3, 8, 9, 10, 11}), frozenset({4, 5, 6, 7})
    assert len(shares) == 6
    assert [share.cores for share in shares].count(big) == 4
    assert {share for share in shares if share.cores == small} == {Share(threads=2, cores=small)}


def test_fewer_processes_than_nodes_use_the_cores_of_all(monkeypatch, tmp_path):
    root = machine(monkeypatch, tmp_path, nodes=["0-3", "4-7"])

    assert divide_cores(1, root) == [Share(threads=8)]


def test_only_nodes_of_which_cores_may_be_used_count(monkeypatch, tmp_path):
    root = machine(monkeypatch, tmp_path, nodes=["0-3", "4-7"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5})

    assert divide_cores(default_processes(root), root) == [Share(threads=1)] * 2


@pytest.mark.parametrize("cores", [set(), {0}, {3, 0, 11}])
def test_list_of_cores_is_read_as_it_was_written(cores):
    assert parse_cores(format_cores(cores)) == cores
    assert parse_cores("0-2,7\n") == {0, 1, 2, 7}


def test_items_wait_for_memory_and_are_served_in_order():
    budget, served = MemoryBudget(100), []

    def work(name: str, size: int) -> None:
        with budget.hold(size):
            served.append(name)

    with budget.hold(60):
        large = threading.Thread(target=work, args=("large", 1000))
        small = threading.Thread(target=work, args=("small", 30))
        large.start()
        wait_until(budget._turn.locked)
        small.start()
        assert served == []
    for thread in (large, small):
        thread.join(DEADLINE_SECONDS)

    assert served == ["large", "small"]


def test_limit_of_allocations_lasts_until_the_last_of_overlapping_blocks_ends():
    limit, before = AllocationLimit(1 << 40), resource.getrlimit(resource.RLIMIT_DATA)

    def is_limited() -> bool:
        return resource.getrlimit(resource.RLIMIT_DATA) != before

    with contextlib.ExitStack() as first:
        first.enter_context(limit.applied())
        with limit.applied():
            first.close()
            assert is_limited()
            with limit.lifted():
                assert not is_limited()
            assert is_limited()

    assert not is_limited()
