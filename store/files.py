"""The files of requests beside the image: further inputs, and those that an answer has. Stored like images, by content.

Used by `requests.py`, `batches.py` and `retention.py` where they change requests. A request's row lists its files; the
table `request_files` has one row for each file that a request refers to, and tells whether one is still needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from store.rows import mapping_to_text


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of a request."""

    #: Lower-case hex digest of its bytes.
    sha256: str
    #: How many bytes.
    size_bytes: int
    #: Its media type.
    media_type: str


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """A file of an answer that is about to be recorded."""

    data: bytes
    media_type: str


def files_to_text(files: Mapping[str, StoredFile]) -> str:
    """Format files as they are in the database: equal files give equal text."""
    named = {name: asdict(one) for name, one in files.items()}
    return mapping_to_text(named, sort_keys=True, separators=(",", ":"))


def files_from_text(text: str) -> Mapping[str, StoredFile]:
    """Parse files that `files_to_text` formatted."""
    return {} if text == "{}" else {name: StoredFile(**one) for name, one in json.loads(text).items()}


def digests_of_inputs(row: Any) -> set[str]:
    """Return the digests of the image and the further inputs of a request's row."""
    return {row["image_sha256"], *(one.sha256 for one in files_from_text(row["inputs"]).values())}


def digests_of_files(row: Any) -> set[str]:
    """Return the digests of everything that a request's row refers to."""
    return digests_of_inputs(row) | {one.sha256 for one in files_from_text(row["files"]).values()}
