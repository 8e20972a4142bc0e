"""The lock file of published provider images: which image in Golem's registry contains which model.

`images.lock` in the home is sorted JSON: model -> published image. `mlg image push` writes it; the golem executor reads
it, so that all providers run exactly the published image. To use the images on another machine, copy the file there.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from batcher.errors import ContainerImageError
from provider_image.models.artefact import is_model_name

#: user/repository in Golem's registry.
REPOSITORY = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}/[a-z0-9][a-z0-9_.-]{0,62}")
#: SHA3-224 of the published file, by which Golem finds it.
HASH = re.compile(r"[0-9a-f]{56}")

_IMAGE = re.compile(rf"{REPOSITORY.pattern}:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_URL = re.compile(r"https?://[!-~]+")


def lock_file(models: Path) -> Path:
    """Return the lock file of a home, which is beside its folder of models."""
    return models.with_name("images.lock")


@dataclass(frozen=True, kw_only=True)
class ImageAddress:
    """An image that need not be in Golem's registry."""

    #: SHA3-224 of the file, 56 hexadecimal digits.
    hash: str
    #: Where providers download it, by HTTP or HTTPS.
    url: str

    @classmethod
    def from_text(cls, text: str) -> ImageAddress:
        """Read HASH@URL. :raises ValueError: the text has another form."""
        found, _, url = text.partition("@")
        if not HASH.fullmatch(found) or not _URL.fullmatch(url):
            raise ValueError(text)
        return cls(hash=found, url=url)


@dataclass(frozen=True, kw_only=True)
class PublishedImage:
    """The entry of one model: its image in Golem's registry."""

    #: user/repository:tag. A tag can be moved to another image later; the hash cannot.
    image: str
    #: SHA3-224 of the published file, 56 hexadecimal digits.
    hash: str
    #: Digest of the model's artefact in the image; results carry it.
    digest: str
    #: Size of the download.
    size_bytes: int
    #: When it was published.
    pushed_at: datetime

    @classmethod
    def from_row(cls, row: Any) -> PublishedImage:
        """Read an entry of the file. :raises ValueError: names the invalid field."""
        if not isinstance(row, dict) or row.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(f"an entry must have exactly the fields {', '.join(cls.__dataclass_fields__)}")
        for name, pattern in (("image", _IMAGE), ("hash", HASH), ("digest", _DIGEST)):
            if not isinstance(row[name], str) or not pattern.fullmatch(row[name]):
                raise ValueError(f"{name} is {row[name]!r}")
        size = row["size_bytes"]
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise ValueError(f"size_bytes is {size!r}")
        if not isinstance(row["pushed_at"], str):
            raise ValueError(f"pushed_at is {row['pushed_at']!r}")
        pushed_at = datetime.fromisoformat(row["pushed_at"])
        if pushed_at.tzinfo is None:
            raise ValueError("pushed_at has no time zone")
        return cls(**{**row, "pushed_at": pushed_at})


def read_lock(path: Path) -> dict[str, PublishedImage]:
    """Read the lock file: model -> published image; empty if there is no file yet.

    :raises ContainerImageError: it cannot be read, or an entry is invalid.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ContainerImageError(f"{path} cannot be read: {error}") from error
    model = ""
    try:
        found = {}
        for model, row in json.loads(text).items():
            if not is_model_name(model):  # it may be a custom model that is not installed here
                raise ValueError("that is not a valid name of a model")
            found[model] = PublishedImage.from_row(row)
    except (ValueError, AttributeError, RecursionError) as error:
        where = f" at {model}" if model else ""
        raise ContainerImageError(
            f"{path} is damaged{where}: {error}. Fix it, or delete it and push the images again."
        ) from error
    return found


def add_to_lock(new: Mapping[str, PublishedImage], path: Path) -> None:
    """Add or replace entries, and keep the others; the file is replaced atomically.

    :raises ContainerImageError: the existing file cannot be read, or the new one cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # two pushes at once must not lose each other's entries
            entries = {**read_lock(path), **new}
            rows = {model: {**asdict(each), "pushed_at": each.pushed_at.isoformat()} for model, each in entries.items()}
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            with temporary.open("w") as file:
                file.write(json.dumps(rows, indent=2, sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ContainerImageError(f"{path} cannot be written: {error.strerror or error}") from error
