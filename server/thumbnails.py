"""Thumbnails of stored images, and contact sheets of many.

Called by the views. Uploads were only checked by their header, so decoding may fail here. It is done in a few processes
with limits on memory and time, and its results are kept beside the images, so a page of images costs little the second
time. Threads that wait for a process are limited, so that uploads always find free ones, also for each client.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from provider_image.decoders import DecoderPool
from provider_image.errors import BadInput, BrokenImage, ChunkTimeout, DecodingUnavailable, MlgError, WorkerDied
from provider_image.images.thumbnails import SHEET_PIXELS
from server.auth.limits import FairSlots
from store.errors import ImageGone, StoreError
from store.images import THUMBNAIL_SIDES, ImageStore

log = logging.getLogger(__name__)

#: Smallest and largest side of a thumbnail.
MIN_THUMBNAIL_PIXELS, MAX_THUMBNAIL_PIXELS = 16, 1024
#: Processes that decode.
_WORKERS = 2
#: Limit for an image, and for all new thumbnails of one sheet; those that are missing then are grey squares, and are
#: made when the sheet is asked for again.
_IMAGE_SECONDS, _SHEET_SECONDS = 10.0, 10.0
#: What a line of a sheet may have, in characters; fewer are shown.
_MAX_LINE = 64


class Thumbnails:
    """Thumbnails of the images of a home.

    :param max_waiting: how many threads may wait for a process, shared fairly by the clients.
    """

    def __init__(self, images: ImageStore, max_waiting: int) -> None:
        self._images = images
        self._slots = FairSlots(max_waiting)
        self._pool = DecoderPool(_WORKERS, limit_seconds=_IMAGE_SECONDS)
        weakref.finalize(self, self._pool.close)

    def get(self, sha256: str, side: int, *, client: str | None = None) -> bytes:
        """Return an image as a JPEG that fits into a square of `side` pixels.

        :param client: as for `FairSlots`.
        :raises ImageGone: it was deleted.
        :raises BadInput: it cannot be decoded.
        :raises DecodingUnavailable: too many threads wait already, or no process can be started.
        """
        data = self._read(sha256, side)
        if data is None:
            with self._slot(client):
                data = self._make(sha256, side)
        if not data:
            raise BrokenImage("The image cannot be decoded. Open it in full size, or save it again and send that file.")
        return data

    def sheet(self, cells: Sequence[tuple[str | None, Sequence[str]]], *, client: str | None = None) -> bytes:
        """Make a PNG of images with lines of text below; a grey square stands for one that cannot be shown.

        :param cells: the hash of an image, or None, and its lines.
        :raises DecodingUnavailable: as `get`.
        """
        give_up_at = time.monotonic() + _SHEET_SECONDS
        shown: list[tuple[str | None, list[str]]] = []
        with self._slot(client):
            for sha256, lines in cells:
                data = None
                if sha256 is not None:
                    data = self._read(sha256, SHEET_PIXELS)
                    if data is None and time.monotonic() < give_up_at:
                        data = self._make_if_possible(sha256)
                shown.append((sha256 if data else None, [line[:_MAX_LINE] for line in lines]))
            paths = {each: str(self._images.thumbnail_path(each, SHEET_PIXELS)) for each, _ in shown if each}
            try:
                return self._run("sheet", {"cells": shown}, paths)["sheet"]
            except ImageGone as error:
                raise DecodingUnavailable("An image of the sheet is not there any more. Try again.") from error

    @contextlib.contextmanager
    def _slot(self, client: str | None) -> Iterator[None]:
        with self._slots.holding(client) as is_held:
            if not is_held:
                raise DecodingUnavailable("Too many images are being decoded. Try again in a moment.")
            yield

    def _read(self, sha256: str, side: int) -> bytes | None:
        """Return a thumbnail that was made before, empty if the image cannot be decoded; None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return self._images.thumbnail_path(sha256, side).read_bytes()
        return None

    def _make_if_possible(self, sha256: str) -> bytes | None:
        try:
            return self._make(sha256, SHEET_PIXELS)
        except DecodingUnavailable:
            raise
        except MlgError as error:
            log.info("an image of a contact sheet cannot be shown: %s", error)
            return None

    def _make(self, sha256: str, side: int) -> bytes:
        try:
            data = self._run("thumbnail", {"side": side}, {"image": str(self._images.path(sha256))})["image"]
        except WorkerDied as error:  # perhaps not because of this image
            raise BrokenImage(error.reason) from error
        except ChunkTimeout as error:
            self._keep(sha256, side, b"")
            raise BrokenImage(error.reason) from error
        except BadInput:
            self._keep(sha256, side, b"")
            raise
        self._keep(sha256, side, data)
        return data

    def _keep(self, sha256: str, side: int, data: bytes) -> None:
        if side in THUMBNAIL_SIDES:
            try:
                self._images.keep_thumbnail(sha256, side, data)
            except StoreError as error:
                log.warning("a thumbnail cannot be kept: %s", error)

    def _run(self, do: str, options: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, bytes]:
        result = self._pool.run({"do": do, "options": options, "inputs": inputs}, wait_seconds=_IMAGE_SECONDS)
        if isinstance(result, FileNotFoundError):
            raise ImageGone() from result
        if isinstance(result, MlgError):
            raise result
        return result
