"""Stages inputs: each is fetched if it came as a URL, checked, and written durably.

Used by `accept.py`. The images of a batch are staged several at a time, because most of it is waiting for the disk or
for other servers; they stay in the order in which they were sent.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from provider_image import errors
from provider_image.features.text import parse_text
from provider_image.images.headers import MEDIA_TYPES, read_header
from provider_image.models.catalogue import ModelFacts
from provider_image.rows import check_columns, format_row, parse_row
from provider_image.service import Input, Service, primary_input
from server.errors import FetchFailed, NotMeasured
from server.intake.batch_parser import BatchItem
from server.intake.url_fetcher import fetch
from server.settings import ServerSettings
from store.batches import RefusedItem
from store.errors import DiskFull, StoreError
from store.images import ImageStore, StagedImage, as_store_error
from store.requests import RequestRecord

#: Images of one batch that are staged at the same time.
MAX_CONCURRENT_ITEMS = 8
#: Bytes of images of one batch that were read and wait to be staged; one may be larger.
MAX_WAITING_BYTES = 16 * 1024 * 1024
#: Seconds that fetching all images of one batch may take; those that are missing then are refused.
MAX_FETCH_SECONDS = 240.0


@dataclass(frozen=True, kw_only=True)
class StagedItem:
    """One item of a batch after its check: staged, and then with its request, or refused."""

    item: BatchItem
    staged: StagedImage | None = None
    refused: RefusedItem | None = None
    request: RequestRecord | None = None


def disk_reserved(min_free_bytes: int) -> DiskFull:
    """Build the error for an upload that would take what must stay free on the disk."""
    return DiskFull(
        f"The server's disk is nearly full; {min_free_bytes} bytes stay free (MLG_MIN_FREE_BYTES). Nothing of this "
        "request was stored. Send it again when there is more space."
    )


class Stager:
    """Stages images in one server process."""

    def __init__(self, settings: ServerSettings, images: ImageStore) -> None:
        self._settings = settings
        self._images = images

    def free_bytes(self) -> int:
        """Count the bytes of the home's disk that uploads may take, at least 1. :raises DiskFull: there is none."""
        home, reserve = self._settings.home, self._settings.min_free_bytes
        try:
            free = shutil.disk_usage(home).free - reserve
        except OSError as error:
            raise as_store_error(error, home) from error
        if free <= 0:
            raise disk_reserved(reserve)
        return free

    def fetch(self, url: str, seconds: float) -> bytes:
        """Fetch an image. :raises UrlRefused: :raises FetchFailed: :raises TooManyBytes: :raises EmptyImage:"""
        data = fetch(url, max_image_bytes=self._settings.max_image_bytes, seconds=seconds)
        if not data:
            raise errors.EmptyImage("There is nothing at this URL.")
        return data

    def stage(self, inputs: Mapping[str, bytes], row: ModelFacts, service: Service) -> StagedImage:
        """Check the inputs of a request and write them durably.

        :param inputs: by name; only those that the service has.
        :return: the first input, with the others.
        :raises BadInput: an image by its header, a row by its columns, a text by its encoding.
        :raises StoreError: for example `disk_reserved`.
        """
        checked = {name: self._check(service.inputs[name], data, row) for name, data in inputs.items()}
        first = primary_input(service)
        if sum(len(data) for data, _ in checked.values()) > self.free_bytes():
            raise disk_reserved(self._settings.min_free_bytes)
        staged = self._images.stage(checked.pop(first)[0])
        if not checked:
            return staged
        try:
            return replace(staged, others=self._stage_others(checked))
        except StoreError:
            self._images.discard(staged)
            raise

    def stage_shared(self, inputs: Mapping[str, bytes], row: ModelFacts, service: Service) -> Mapping[str, StagedImage]:
        """Check the inputs that all requests of a batch have, and write them durably.

        :param inputs: by name; not the first one of the service.
        :raises BadInput: names the input. :raises StoreError:
        """
        checked: dict[str, tuple[bytes, str]] = {}
        for name, data in inputs.items():
            try:
                checked[name] = self._check(service.inputs[name], data, row)
            except errors.BadInput as error:
                raise type(error)(f"The field `{name}` cannot be used: {error.reason}") from error
        if sum(len(data) for data, _ in checked.values()) > self.free_bytes():
            raise disk_reserved(self._settings.min_free_bytes)
        return self._stage_others(checked)

    def _stage_others(self, checked: Mapping[str, tuple[bytes, str]]) -> Mapping[str, StagedImage]:
        """Write inputs beside the first. :param checked: bytes and media type of each. :raises StoreError:"""
        others: dict[str, StagedImage] = {}
        try:
            for name, (data, media_type) in checked.items():
                others[name] = replace(self._images.stage(data), media_type=media_type)
        except StoreError:
            for each in others.values():
                self._images.discard(each)
            raise
        return others

    def _check(self, one: Input, data: bytes, model: ModelFacts) -> tuple[bytes, str]:
        """Check one input. :return: the bytes to store, and their media type. :raises BadInput:"""
        if len(data) > one.max_bytes:
            raise errors.TooManyBytes(f"The {one.kind} may have at most {one.max_bytes} bytes.")
        if one.kind == "image":
            return data, MEDIA_TYPES[read_header(data, self._settings.max_pixels).format]
        if one.kind == "row":
            row = parse_row(data)
            if model.columns:
                check_columns(row, model.columns)
            return format_row(row), "application/json"
        if one.kind == "text":
            return parse_text(data).encode(), "text/plain"
        return data, "application/octet-stream"

    def stage_items(
        self,
        items: Iterator[BatchItem],
        row: ModelFacts,
        service: Service,
        *,
        room: int,
        is_full: errors.MlgError,
        check: Callable[[StagedImage], None] | None = None,
    ) -> list[StagedItem]:
        """Check and stage items, several at a time, in order.

        :param check: called with each that was staged, in several threads; a BadInput or NotMeasured refuses it.
        :raises MlgError: `is_full`, if there are more than `room`, or what the items raise. Nothing is left behind.
        """
        outcomes: list[StagedItem] = []
        give_up_at = time.monotonic() + MAX_FETCH_SECONDS
        with ThreadPoolExecutor(MAX_CONCURRENT_ITEMS, thread_name_prefix="batch") as threads:
            waiting: deque[Future[StagedItem]] = deque()
            sizes: deque[int] = deque()  # of those that wait
            try:
                for item in items:
                    if item.position >= room:
                        raise is_full
                    waiting.append(threads.submit(self._stage_item, item, give_up_at, row, service, check))
                    sizes.append(len(item.data or b""))
                    while len(waiting) > 2 * MAX_CONCURRENT_ITEMS or sum(sizes) > MAX_WAITING_BYTES:
                        sizes.popleft()
                        outcomes.append(waiting.popleft().result())
                outcomes += [future.result() for future in waiting]
            except BaseException:
                for future in waiting:
                    if not future.cancel() and future.exception() is None:
                        outcomes.append(future.result())
                self.discard(outcomes)
                raise
        return outcomes

    def _stage_item(
        self,
        item: BatchItem,
        give_up_at: float,
        row: ModelFacts,
        service: Service,
        check: Callable[[StagedImage], None] | None,
    ) -> StagedItem:
        without_data = replace(item, data=None)
        try:
            if item.error is not None:
                raise item.error
            data = item.data or b""
            if item.url is not None:
                seconds = min(self._settings.fetch_seconds, give_up_at - time.monotonic())
                if seconds <= 0:
                    raise FetchFailed("Fetching the images of the batch took too long. Send the rest as another batch.")
                data = self.fetch(item.url, seconds)
            staged = self.stage({primary_input(service): data}, row, service)
            if check is not None:
                self.check(staged, check)
            return StagedItem(item=without_data, staged=staged)
        except (errors.BadInput, FetchFailed, NotMeasured) as error:
            refused = RefusedItem(
                position=item.position, client_id=item.client_id, code=error.code, reason=error.reason
            )
            return StagedItem(item=without_data, refused=refused)

    def check(self, staged: StagedImage, check: Callable[[StagedImage], None]) -> None:
        """Call a check of what was staged, and delete it if that raises."""
        try:
            check(staged)
        except BaseException:
            self._images.discard(staged)
            raise

    def discard(self, outcomes: Sequence[StagedItem], shared: Mapping[str, StagedImage] = {}) -> None:
        """Delete what was staged."""
        staged = [outcome.staged for outcome in outcomes if outcome.staged is not None]
        for each in (*staged, *shared.values()):
            self._images.discard(each)
