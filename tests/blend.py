"""Answering requests of the service `blend`, whose answer is an image, as a worker would."""

from __future__ import annotations

import io
from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from PIL import Image

from store.files import NewFile
from store.processes.progress import NewProgress
from store.requests import Answer, Claim
from store.store import Store

#: Its model; `install_extension_models` installs it.
MODEL = "blend_even"


def image(color: str, format: str = "PNG") -> bytes:
    """A file of an image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (96, 64), color).save(file, format)
    return file.getvalue()


def claim(store: Store) -> list[Claim]:
    """Claim all requests of the model."""
    now = datetime.now(UTC)
    return store.requests.claim(
        models=[MODEL], limit=100, now=now, lease_ends_at=now + timedelta(seconds=60), oldest_before=None
    )


def finish(store: Store, claims: Collection[Claim], color: str = "green", format: str = "JPEG") -> None:
    """Answer requests with an image of one colour."""
    kind = f"image/{format.lower()}"
    answers = [
        Answer(
            claim=each,
            output={"width": 96, "height": 64, "params": {}},
            files={"image": NewFile(data=image(color, format), media_type=kind)},
            digest="d" * 64,
            chunk_id="c1",
            provider="local",
            seconds=0.1,
        )
        for each in claims
    ]
    assert store.requests.finish(answers, now=datetime.now(UTC)) == len(claims)


def report(store: Store, claims: Collection[Claim], fraction: float, preview: bytes | None = None) -> None:
    """Report progress of requests."""
    store.progress.record(
        [NewProgress(number=one.number, token=one.token, fraction=fraction, preview=preview) for one in claims]
    )
