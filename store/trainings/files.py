"""The files of trainings: `trainings/ID/NAME` in the home, each written whole and durably.

A training's folder is written before its row refers to it, and deleted after the row.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from store.images import as_store_error, sync_folder

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.[a-z]{1,8}")
#: The name of the table that was sent; deleted when the training has ended.
INPUT = "input.csv"
#: Folders without a row are deleted when they are older than this.
LEFTOVER_SECONDS = 3600.0


class TrainingFiles:
    """The folder of all trainings' files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, id: str, name: str) -> Path:
        """Return the path of a file, whether or not it exists. :raises ValueError: the name is no plain file name."""
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a plain file name")
        return self.folder / id / name

    def write(self, id: str, name: str, data: bytes) -> None:
        """Write a file durably, in place of an earlier one of this name. :raises StoreError:"""
        path = self.path(id, name)
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(path.parent)
            sync_folder(self.folder)
        except OSError as error:
            raise as_store_error(error, self.folder) from error

    def read(self, id: str, name: str) -> bytes:
        """Read a file. :raises FileNotFoundError: there is none."""
        return self.path(id, name).read_bytes()

    def remove_input(self, id: str) -> None:
        """Delete the table that was sent."""
        self.path(id, INPUT).unlink(missing_ok=True)

    def remove(self, id: str) -> None:
        """Delete all files of a training."""
        shutil.rmtree(self.folder / id, ignore_errors=True)

    def sweep(self, is_known: Callable[[str], bool]) -> int:
        """Delete the folders that killed processes left. :return: how many."""
        if not self.folder.is_dir():
            return 0
        old = time.time() - LEFTOVER_SECONDS
        leftovers = [
            path.name for path in self.folder.iterdir() if path.stat().st_mtime < old and not is_known(path.name)
        ]
        for id in leftovers:
            self.remove(id)
        return len(leftovers)
