"""Groups claims into chunks. Pure: no clock, no I/O; the same claims always give the same plan.

Called by `batcher.cycle`. Only the bytes of the inputs count, not the few hundred bytes of a chunk's description.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from provider_image.schemas import MAX_BYTES, MAX_ITEMS
from provider_image.services import chunk_items
from store.requests import ISOLATION_STEPS, Claim


@dataclass(frozen=True, kw_only=True)
class PlannedItem:
    """One item to process, and all claims that wait for its answer."""

    #: Equal requests, oldest first; usually one. Isolated claims are never joined, so that each is tried alone.
    claims: tuple[Claim, ...]

    @property
    def first(self) -> Claim:
        """The oldest claim; its inputs and parameters are those of all."""
        return self.claims[0]


@dataclass(frozen=True, kw_only=True)
class PlannedChunk:
    """Items of one model that are sent together."""

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
        """The claims of all items."""
        return [claim for item in self.items for claim in item.claims]

    @property
    def input_bytes(self) -> int:
        """Bytes of the inputs; those of equal claims that are joined to one item count once."""
        return sum(item.first.input_bytes for item in self.items)


def stored_bytes(claim: Claim) -> int:
    """Return the size of a claim's inputs as they were sent."""
    return claim.input_bytes


def plan(
    claims: Iterable[Claim],
    *,
    max_items: int = MAX_ITEMS,
    max_bytes: int = MAX_BYTES,
    packed_bytes: Callable[[Claim], int] = stored_bytes,
) -> list[PlannedChunk]:
    """Plan chunks: each claim in exactly one, oldest first within a model and among chunks.

    An item larger than `max_bytes` gets a chunk of its own.

    :param packed_bytes: what the inputs of a claim take in a chunk.
    """
    groups: dict[tuple[str, str, int], list[Claim]] = {}
    for claim in sorted(claims, key=lambda claim: claim.number):
        isolation = min(claim.isolation, len(ISOLATION_STEPS) - 1)
        groups.setdefault((claim.service, claim.model, isolation), []).append(claim)
    chunks = [
        PlannedChunk(service=service, model=model, isolation=isolation, items=tuple(items))
        for (service, model, isolation), group in groups.items()
        for items in _fill(
            _join_equal(group),
            min(max_items, ISOLATION_STEPS[isolation], chunk_items(service)),
            max_bytes,
            packed_bytes,
        )
    ]
    return sorted(chunks, key=lambda chunk: chunk.items[0].first.number)


def _join_equal(group: Sequence[Claim]) -> list[PlannedItem]:
    """Join equal claims, sorted by number, to items; an item takes the position of its oldest claim."""
    joined: dict[Any, list[Claim]] = {}
    for claim in group:
        others = tuple(sorted((name, one.sha256) for name, one in claim.inputs.items()))
        params = json.dumps(claim.params, sort_keys=True)
        key = (claim.image_sha256, others, params) if claim.isolation == 0 else claim.number
        joined.setdefault(key, []).append(claim)
    return [PlannedItem(claims=tuple(claims)) for claims in joined.values()]


def _fill(
    items: Iterable[PlannedItem], max_items: int, max_bytes: int, packed_bytes: Callable[[Claim], int]
) -> list[list[PlannedItem]]:
    # Next fit, not best fit: an older item is never sent after a younger one.
    filled: list[list[PlannedItem]] = []
    size = 0
    for item in items:
        item_bytes = packed_bytes(item.first)
        if not filled or len(filled[-1]) >= max_items or size + item_bytes > max_bytes:
            filled.append([])
            size = 0
        filled[-1].append(item)
        size += item_bytes
    return filled
