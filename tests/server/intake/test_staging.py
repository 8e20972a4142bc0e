"""Staging: the images of a batch are not all in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from provider_image.models.catalogue import CATALOGUE
from provider_image.services import load_service
from server.errors import BacklogFull
from server.intake.batch_parser import BatchItem
from server.intake.staging import MAX_WAITING_BYTES, Stager
from server.settings import ServerSettings
from store.store import Store


def test_few_large_images_of_a_batch_wait_in_memory(settings: ServerSettings, store: Store) -> None:
    size = MAX_WAITING_BYTES // 2
    data, read, staged, most = bytes(size), 0, 0, 0
    lock, all_read = threading.Lock(), threading.Event()

    class SlowStager(Stager):
        def stage(self, *arguments: Any) -> Any:
            nonlocal staged
            all_read.wait(0.1)  # never set if reading waits for this
            with lock:
                staged += 1
            return None

    def items() -> Iterator[BatchItem]:
        nonlocal read, most
        for position in range(6):
            with lock:
                read += 1
                most = max(most, read - staged)
            yield BatchItem(position=position, client_id=str(position), data=data)
        all_read.set()

    outcomes = SlowStager(settings, store.images).stage_items(
        items(), CATALOGUE["efficientnet_lite0"], load_service("classification"), room=6, is_full=BacklogFull()
    )

    assert [outcome.item.position for outcome in outcomes] == list(range(6))
    assert most <= 3  # two that wait, and the one that was just read
