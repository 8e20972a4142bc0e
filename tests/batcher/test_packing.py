"""A chunk asks a worker for no more than the chunk may take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batcher.packing import pack
from batcher.planner import plan
from provider_image.chunk import open_chunk


@pytest.mark.parametrize(("timeout_seconds", "expected"), [(120.0, [10, 90.0]), (600.0, [10, 300]), (0.01, [0.1, 0.1])])
def test_the_time_of_an_item_is_limited_by_that_of_its_chunk(
    harness: Any, tmp_path: Path, timeout_seconds: float, expected: list[float]
) -> None:
    harness.add_many(1)
    now = harness.clock.now
    (claim,) = harness.store.requests.claim(
        models={"efficientnet_lite0"}, limit=1, now=now, lease_ends_at=now, oldest_before=None
    )
    found = []

    for seconds in (10, 300):
        style = replace(claim, service="style_transfer", model="texture", params={"seconds": seconds, "size": 64})
        packed = pack(
            plan([style])[0],
            folder=tmp_path,
            image_path=harness.store.images.path,
            models=harness.models,
            resizer=None,
            timeout_seconds=timeout_seconds,
        )
        with open_chunk(packed.chunk) as reader:
            found.append(reader.items[0].params["seconds"])
            assert reader.items[0].params["size"] == 64

    assert found == expected
