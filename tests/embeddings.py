"""A batcher of the tests for embeddings: the vector of an image follows from its pixel."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from provider_image.models.artefact import find_artefact
from store.files import NewFile
from store.requests import Answer
from store.store import Store

MODEL = "efficientnet_lite0_embedding"
DIMENSIONS = 16


def make_image(shade: int) -> bytes:
    """A PNG of one pixel."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), (shade % 256, shade // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def vector_of(shade: int) -> np.ndarray:
    """A unit vector; near shades have similar ones."""
    angle = shade / 100
    values = np.zeros(DIMENSIONS)
    values[:2] = np.cos(angle), np.sin(angle)
    return values.astype("<f4")


def answer_embeddings(store: Store, models: Path, **facts: Any) -> int:
    """Answer everything that is queued, as a batcher would. :return: how many."""
    digest = find_artefact(models, MODEL).digest
    now = datetime.now(UTC)
    claims = store.requests.claim(
        models=[MODEL, "efficientnet_lite0"],
        limit=100,
        now=now,
        lease_ends_at=now + timedelta(seconds=30),
        oldest_before=None,
    )
    answers = []
    for claim in claims:
        red, green, _ = Image.open(io.BytesIO(store.images.read(claim.image_sha256))).getpixel((0, 0))
        file = NewFile(data=vector_of(red + 256 * green).tobytes(), media_type="application/octet-stream")
        is_vector = claim.model == MODEL
        output: Any = {"dimensions": DIMENSIONS} if is_vector else [["n1", f"shade_{red}", 0.9]]
        values = {"digest": digest, "chunk_id": "c", "provider": "local", "seconds": 0.01, **facts}
        answers.append(Answer(claim=claim, output=output, files={"vector": file} if is_vector else {}, **values))
    return store.requests.finish(answers, now=now)
