"""A batcher's folder of temporary files, and the lock that shows whether the batcher runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from batcher.workspace import Workspace
from store.errors import StoreUnavailable

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time, pathlib
from batcher.workspace import Workspace
workspace = Workspace(pathlib.Path(sys.argv[1]), sys.argv[2])
workspace.create()
(workspace.folder / "chunk.zip").write_bytes(b"half a chunk")
print("locked", flush=True)
time.sleep(600)
"""


def test_only_the_folders_of_dead_batchers_are_removed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holders = [
        subprocess.Popen([*command, name], cwd=ROOT, stdout=subprocess.PIPE) for name in ("living00", "killed00")
    ]
    for holder in holders:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
    os.kill(holders[1].pid, signal.SIGKILL)
    holders[1].wait()

    workspace = Workspace(tmp_path, "mine0000")
    removed = workspace.create()
    found = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    workspace.remove()
    for holder in holders:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()

    assert removed == ["killed00"]
    assert found == ["living00", "mine0000"]


def test_a_workspace_may_be_removed_twice_and_leaves_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "work", "0123456789abcdef")
    workspace.create()
    (workspace.folder / "left.zip").write_bytes(b"x")

    workspace.remove()
    workspace.remove()

    assert [path.name for path in (tmp_path / "work").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_created_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file is in the way")

    with pytest.raises(StoreUnavailable, match="cannot be used"):
        Workspace(tmp_path / "work", "0123456789abcdef").create()
