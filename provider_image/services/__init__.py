"""The registry of services."""

from __future__ import annotations

import functools
from typing import cast

from provider_image.errors import MalformedChunk
from provider_image.extensions import SERVICES, Extensions
from provider_image.schemas import MAX_BYTES, MAX_ITEMS
from provider_image.service import Service

#: name -> "module:Class"; the class takes no arguments. Other packages add to it by entry points of this group.
REGISTRY = Extensions(
    SERVICES,
    {
        "classification": "provider_image.services.classification:Classification",
        "crop": "provider_image.services.crop:Crop",
        "embedding": "provider_image.services.embedding:Embedding",
        "face_detection": "provider_image.services.face_detection:FaceDetection",
        "face_quality": "provider_image.services.face_quality:FaceQuality",
        "image_to_image": "provider_image.services.image_to_image:ImageToImage",
        "quality": "provider_image.services.quality:Quality",
        "regression": "provider_image.services.regression:Regression",
        "style_transfer": "provider_image.services.style_transfer:StyleTransfer",
        "table": "provider_image.services.table:Table",
        "text": "provider_image.services.text:Text",
    },
)


@functools.cache
def load_service(name: str) -> Service:
    """Return the service of this name, the same object at every call. :raises MalformedChunk: there is none."""
    if name not in REGISTRY:
        raise MalformedChunk(f"There is no service {name[:64]!r}. There are: {', '.join(sorted(REGISTRY))}.")
    return cast(Service, REGISTRY.load(name)())


def chunk_items(name: str) -> int:
    """Return the most items of a chunk of a service: so many that the files of their answers fit into a results file.

    Fewer where the class has `chunk_items`. A service whose items take seconds each has 1: a chunk must end within
    `MLG_CHUNK_TIMEOUT_SECONDS`.
    """
    if name not in REGISTRY:
        return MAX_ITEMS
    service = load_service(name)
    answer_bytes = sum(one.max_bytes for one in service.outputs.values())
    most = MAX_ITEMS if not answer_bytes else max(1, MAX_BYTES // answer_bytes)
    return min(MAX_ITEMS, most, getattr(service, "chunk_items", MAX_ITEMS))
