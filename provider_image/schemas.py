"""The schemas of `chunk.json` and `results.json`, checked field by field.

Called by `chunk.py` for every document that it reads, and for a chunk before it is written. The author of a document is
not trusted: unknown fields, wrong types, deep nesting and long texts are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from provider_image.errors import ChunkError, MalformedChunk, MalformedResults, MlgError

#: Version of both documents; a reader refuses any other.
VERSION = 1
#: Most items in a chunk.
MAX_ITEMS = 16
#: Most bytes of all inputs in a chunk, or of all output files in a results file.
MAX_BYTES = 64 * 1024 * 1024
#: The longest that a requestor waits for a chunk, in seconds.
MAX_CHUNK_SECONDS = 18_000.0
#: Most files of one item.
MAX_FILES = 8
#: Most levels of lists and objects in params and outputs.
MAX_DEPTH = 16
#: Most characters of an item's reason; a longer one is truncated when written.
MAX_REASON = 1000
#: The fields of results.json beside its version.
RESULTS_FIELDS = [
    "chunk_id",
    "model",
    "digest",
    "versions",
    "precision",
    "cpu",
    "load_seconds",
    "peak_memory_bytes",
    "items",
]
#: Allowed names of inputs and output files.
FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,31}(\.[a-z0-9]{1,8})?")

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WORD = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK_FIELDS = {"version", "chunk_id", "service", "model", "digest", "is_shrunk", "items"}


def parse_json(raw: bytes, error: type[MlgError], name: str) -> Any:
    """Parse JSON from elsewhere. :raises error: it is invalid, has a field twice, or a number that is not finite."""

    def refuse(text: str) -> Any:
        raise ValueError(f"{text[:20]} is not a JSON number")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a field occurs twice")
        return found

    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=refuse, parse_float=number, object_pairs_hook=fields)
        if b"\\u" in raw:
            json.dumps(
                found, ensure_ascii=False
            ).encode()  # an escape may name half a character, which nothing can encode
        return found
    except (ValueError, RecursionError) as cause:
        raise error(f"{name} is not valid JSON: {cause}") from cause


def check_chunk(document: Any) -> None:
    """Check a chunk.json. :raises MalformedChunk: names the rule that it violates."""

    require = _requirement(MalformedChunk, "chunk")
    require(isinstance(document, dict), "chunk.json is not an object")
    require(document.get("version") == VERSION, f"its version is not {VERSION}")
    require(document.keys() == _CHUNK_FIELDS, "chunk.json has missing or unknown fields")
    require(_is_text(document["chunk_id"], _ID), "its id has invalid characters")
    require(_is_text(document["service"], _WORD), "its service is not a valid name")
    require(_is_text(document["model"], _WORD), "its model is not a valid name")
    require(document["digest"] is None or _is_text(document["digest"], _DIGEST), "its digest is invalid")
    require(isinstance(document["is_shrunk"], bool), "is_shrunk is not a boolean")
    items = document["items"]
    require(isinstance(items, list) and 0 < len(items) <= MAX_ITEMS, f"it does not have 1 to {MAX_ITEMS} items")
    for number, item in enumerate(items):
        require(
            isinstance(item, dict) and item.keys() == {"number", "inputs", "params"},
            "an item has missing or unknown fields",
        )
        require(_is_count(item["number"]) and item["number"] == number, "its items are not numbered from 0")
        require(_are_files(item["inputs"]) and len(item["inputs"]) > 0, "an item's inputs are invalid")
        require(
            isinstance(item["params"], dict) and _is_shallow(item["params"]),
            "an item's params are not an object, or nested too deep",
        )


def check_results(document: Any) -> None:
    """Check a results.json. :raises MalformedResults: names the rule that it violates."""

    require = _requirement(MalformedResults, "results")
    require(isinstance(document, dict), "results.json is not an object")
    require(document.get("version") == VERSION, f"its version is not {VERSION}")
    require(document.keys() == {"version", *RESULTS_FIELDS}, "results.json has missing or unknown fields")
    require(
        _is_text(document["chunk_id"], _ID) and _is_text(document["model"], _WORD),
        "its id or model is not a valid name",
    )
    require(_is_text(document["digest"], _DIGEST), "its digest is invalid")
    versions = document["versions"]
    require(isinstance(versions, dict) and len(versions) <= 20, "its versions are not a small object")
    require(
        all(isinstance(v, str) and len(k) <= 40 and len(v) <= 100 for k, v in versions.items()), "a version is invalid"
    )
    require(_is_text(document["precision"], _WORD), "its precision is invalid")
    require(isinstance(document["cpu"], str) and len(document["cpu"]) <= 200, "its cpu is not a short text")
    require(_is_seconds(document["load_seconds"]), "its load_seconds are invalid")
    require(_is_count(document["peak_memory_bytes"]), "its peak_memory_bytes are invalid")
    require(isinstance(document["items"], list) and len(document["items"]) <= MAX_ITEMS, "it has too many items")
    for item in document["items"]:
        require(isinstance(item, dict) and isinstance(item.get("ok"), bool), "an item has no valid ok")
        require(
            item.keys() - {"output", "files", "error"} == {"number", "ok", "seconds"},
            "an item has missing or unknown fields",
        )
        require(_is_count(item["number"]) and _is_seconds(item["seconds"]), "an item's number or seconds are invalid")
        if item["ok"]:
            require(
                "error" not in item and {"output", "files"} <= item.keys(),
                "a successful item has missing or unknown fields",
            )
            require(_are_files(item["files"]), "an item's files are invalid")
            require(_is_shallow(item["output"]), "an output is nested too deep")
        else:
            error = item.get("error")
            require(item.keys().isdisjoint({"output", "files"}), "a failed item has an output")
            require(
                isinstance(error, dict) and error.keys() == {"code", "reason", "permanent"},
                "an error has missing or unknown fields",
            )
            require(
                _is_text(error["code"], _WORD) and isinstance(error["permanent"], bool), "an error's code is invalid"
            )
            require(isinstance(error["reason"], str) and len(error["reason"]) <= MAX_REASON, "a reason is too long")


def _requirement(error: type[ChunkError], kind: str) -> Callable[[bool, str], None]:
    def require(is_met: bool, what: str) -> None:
        if not is_met:
            raise error(f"The {kind} file is malformed: {what}.")

    return require


def _is_text(value: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9


def _are_files(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_FILES
        and all(FILE_NAME.fullmatch(name) and _is_count(size) and size <= MAX_BYTES for name, size in value.items())
    )


def _is_shallow(value: Any, levels: int = MAX_DEPTH) -> bool:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return levels > 0 and all(_is_shallow(each, levels - 1) for each in inner)
    return True
