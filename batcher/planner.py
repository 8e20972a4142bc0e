"""Groups claims into chunks. Pure: no clock, no input or output, the same claims always give the same plan.

Called by `batcher.cycle`. Bytes are counted over the pictures; the few hundred bytes of a chunk's own description are
left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from store.records import ISOLATION_STEPS, Claim

#: Items in a chunk at most.
MAX_ITEMS = 16
#: Bytes of pictures in a chunk at most.
MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class PlannedItem:
    """One picture to work on, and everybody who waits for its answer."""

    #: Equal requests, oldest first; usually one. Those under suspicion are never joined, so each is tried by itself.
    claims: tuple[Claim, ...]

    @property
    def first(self) -> Claim:
        """The oldest claim; what it says of picture and parameters holds for all."""
        return self.claims[0]


@dataclass(frozen=True, kw_only=True)
class PlannedChunk:
    """Items of one model that go out together."""

    #: The kind of service.
    service: str
    #: The model's canonical name.
    model: str
    #: Index into ISOLATION_STEPS, the same for all items.
    isolation: int
    #: Oldest first.
    items: tuple[PlannedItem, ...]

    @property
    def claims(self) -> list[Claim]:
        """Every claim inside."""
        return [claim for item in self.items for claim in item.claims]

    @property
    def image_bytes(self) -> int:
        """Bytes of pictures; equal pictures that became one item count once."""
        return sum(item.first.image_bytes for item in self.items)


def plan(claims: Iterable[Claim], *, max_items: int = MAX_ITEMS, max_bytes: int = MAX_BYTES) -> list[PlannedChunk]:
    """Plan chunks: each claim in exactly one, oldest first within a model and among chunks.

    An item larger than `max_bytes` goes alone rather than never.
    """
    groups: dict[tuple[str, str, int], list[Claim]] = {}
    for claim in sorted(claims, key=lambda claim: claim.number):
        isolation = min(claim.isolation, len(ISOLATION_STEPS) - 1)
        groups.setdefault((claim.service, claim.model, isolation), []).append(claim)
    chunks = [
        PlannedChunk(service=service, model=model, isolation=isolation, items=tuple(items))
        for (service, model, isolation), group in groups.items()
        for items in _fill(_join_equal(group), min(max_items, ISOLATION_STEPS[isolation]), max_bytes)
    ]
    return sorted(chunks, key=lambda chunk: chunk.items[0].first.number)


def _join_equal(group: Sequence[Claim]) -> list[PlannedItem]:
    """Make items of claims that are sorted by number; an item stands where its oldest claim stood."""
    joined: dict[Any, list[Claim]] = {}
    for claim in group:
        params = json.dumps(claim.params, sort_keys=True)
        key = (claim.image_sha256, params) if claim.isolation == 0 else claim.number
        joined.setdefault(key, []).append(claim)
    return [PlannedItem(claims=tuple(claims)) for claims in joined.values()]


def _fill(items: Iterable[PlannedItem], max_items: int, max_bytes: int) -> list[list[PlannedItem]]:
    # Next fit, not best fit: an older item never goes out after a younger one.
    filled: list[list[PlannedItem]] = []
    size = 0
    for item in items:
        item_bytes = item.first.image_bytes
        if not filled or len(filled[-1]) >= max_items or size + item_bytes > max_bytes:
            filled.append([])
            size = 0
        filled[-1].append(item)
        size += item_bytes
    return filled
