"""Images and other files, named by the sha256 of their bytes; one copy of equal bytes.

    blobs/tmp/<random>            staged; nothing refers to it
    blobs/pictures/<sha256>       published; rows of `requests` and `request_files` refer to it
    blobs/thumbnails/<sha256>-160 made of it for pages when needed, and deleted with it

All published images are in one folder on purpose: a commit that publishes sixteen images then syncs one folder and not
sixteen (0.3 ms against 2.9 ms on ext4, where every fsync is a flush of the disk).

Request threads call `stage`, which makes the bytes durable under a temporary name. Only the store publishes and deletes
images, while it holds the database's write lock, so that no row ever refers to a file that another process is deleting.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from store.errors import DiskFull, StoreError, StoreUnavailable

if TYPE_CHECKING:
    import sqlite3

#: Sides of the thumbnails that are kept: those of contact sheets, lists and the page of a request.
THUMBNAIL_SIDES = (128, 160, 640)
#: Staged files of killed processes are deleted when they are older than this.
LEFTOVER_SECONDS = 3600.0

_IS_NEEDED = """
    SELECT EXISTS (SELECT 1 FROM requests WHERE image_sha256 = :sha256 AND image_deleted_at IS NULL)
        OR EXISTS (SELECT 1 FROM request_files WHERE sha256 = :sha256)
"""


@dataclass(frozen=True, kw_only=True)
class StagedImage:
    """Bytes that are durable under a temporary name."""

    #: The temporary file.
    path: Path
    #: Lower-case hex digest of the bytes.
    sha256: str
    #: How many bytes.
    size: int
    #: Its media type; only of files beside the image.
    media_type: str = ""
    #: The other inputs of the same request, by name.
    others: Mapping[str, StagedImage] = field(default_factory=dict)


def as_store_error(error: OSError, folder: Path) -> StoreError:
    """Translate an error of the file system into one that tells the cure."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFull()
    return StoreUnavailable(
        f"The folder {folder} cannot be written: {error.strerror or error}. "
        "Check that it exists, belongs to this user and is not read-only."
    )


def sync_folder(folder: Path) -> None:
    """Make the directory entries of a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class ImageStore:
    """The folder of images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Where the published images are.
        self.published_folder = folder / "pictures"
        self._published_path = str(self.published_folder)
        self._staging = folder / "tmp"
        self._thumbnails = folder / "thumbnails"

    def create(self) -> None:
        """Create the folders. :raises StoreUnavailable: they cannot be created."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for each in (self._staging, self.published_folder, self._thumbnails):
                each.mkdir(exist_ok=True, mode=0o750)
            sync_folder(self.folder)
        except OSError as error:
            raise as_store_error(error, self.folder) from error

    def path(self, sha256: str) -> Path:
        """Return the path of an image, whether or not it exists."""
        return self.published_folder / sha256

    def read(self, sha256: str) -> bytes:
        """Read an image. :raises FileNotFoundError: retention has deleted it."""
        return self.path(sha256).read_bytes()

    def stage(self, data: bytes) -> StagedImage:
        """Write bytes durably under a temporary name.

        :raises DiskFull: nothing is left behind.
        :raises StoreUnavailable: likewise.
        """
        path = self._staging / secrets.token_hex(16)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(handle, view) :]
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise as_store_error(error, self.folder) from error
        return StagedImage(path=path, sha256=hashlib.sha256(data).hexdigest(), size=len(data))

    def discard(self, staged: StagedImage) -> None:
        """Delete staged bytes, and those of the other inputs; does nothing when they were published."""
        for each in (staged, *staged.others.values()):
            each.path.unlink(missing_ok=True)

    def publish(self, staged: StagedImage) -> None:
        """Give staged bytes their final name. Only under the store's write lock; `sync` makes the name durable.

        Equal bytes that were published before are overwritten, which is cheaper than checking first.

        :raises StoreUnavailable:
        """
        try:
            os.rename(staged.path, f"{self._published_path}/{staged.sha256}")  # noqa: PTH104 - half of Path.rename
        except OSError as error:
            raise as_store_error(error, self.folder) from error

    def sync(self) -> None:
        """Make the names of published images durable. :raises StoreError:"""
        try:
            sync_folder(self.published_folder)
        except OSError as error:
            raise as_store_error(error, self.folder) from error

    def delete(self, sha256: str) -> bool:
        """Delete an image with its thumbnails. Only under the store's write lock. :return: whether it existed."""
        existed = False
        with contextlib.suppress(FileNotFoundError):
            self.path(sha256).unlink()
            existed = True
        self._delete_thumbnails(sha256)
        return existed

    def thumbnail_path(self, sha256: str, side: int) -> Path:
        """Return the path of a thumbnail of an image, whether or not it exists."""
        return self._thumbnails / f"{sha256}-{side}"

    def keep_thumbnail(self, sha256: str, side: int, data: bytes) -> None:
        """Keep a thumbnail for as long as its image is stored.

        :param side: one of THUMBNAIL_SIDES.
        :raises StoreError: it cannot be written; nothing is left behind.
        """
        path = self._staging / secrets.token_hex(16)
        try:
            path.write_bytes(data)
            path.rename(self.thumbnail_path(sha256, side))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise as_store_error(error, self.folder) from error
        if not self.path(sha256).exists():  # deleted meanwhile, and its thumbnails before this one
            self._delete_thumbnails(sha256)

    def _delete_thumbnails(self, sha256: str) -> None:
        for side in THUMBNAIL_SIDES:
            self.thumbnail_path(sha256, side).unlink(missing_ok=True)

    def list_digests(self) -> Iterator[str]:
        """Iterate over the digests of the published images."""
        with os.scandir(self.published_folder) as entries:
            yield from (entry.name for entry in entries)

    def sweep_staging(self, *, now: float) -> int:
        """Delete staged files of killed processes. :param now: seconds since the epoch. :return: how many."""
        swept = 0
        with os.scandir(self._staging) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if now - entry.stat().st_mtime > LEFTOVER_SECONDS:
                        Path(entry.path).unlink()
                        swept += 1
        return swept


def is_needed(connection: sqlite3.Connection, sha256: str) -> bool:
    """Tell whether any request needs a file. One that none needs was never acknowledged, or is to be deleted."""
    return bool(connection.execute(_IS_NEEDED, {"sha256": sha256}).fetchone()[0])
