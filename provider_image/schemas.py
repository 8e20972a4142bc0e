"""The rules of `chunk.json` and `results.json`: what a reader takes, field by field.

Called by `chunk.py` on everything that it reads, and on what it is about to write. Whoever wrote the document is not
trusted: unknown fields, odd types, deep nesting and long texts are refused.
"""

from __future__ import annotations

import re
from typing import Any

from provider_image.errors import MalformedChunk, MalformedResults

#: Version of both documents; a reader refuses any other.
VERSION = 1
#: Items in a chunk at most.
MAX_ITEMS = 16
#: Bytes of inputs in a chunk, or of output files in a results file, at most.
MAX_BYTES = 64 * 1024 * 1024
#: Files of one item at most.
MAX_FILES = 8
#: Levels of lists and objects in params and outputs at most.
MAX_DEPTH = 16
#: Characters of an item's reason at most; a longer one is cut when written.
MAX_REASON = 1000
#: What an input or an output file may be called.
FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,31}(\.[a-z0-9]{1,8})?")

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WORD = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK_FIELDS = {"version", "chunk_id", "service", "model", "digest", "is_shrunk", "items"}
_RESULTS_FIELDS = {
    "version",
    "chunk_id",
    "model",
    "digest",
    "versions",
    "precision",
    "cpu",
    "load_seconds",
    "peak_memory_bytes",
    "items",
}


def check_chunk(document: Any) -> None:
    """Check a chunk.json. :raises MalformedChunk: names the rule that it breaks."""

    def rule(holds: bool, what: str) -> None:
        if not holds:
            raise MalformedChunk(f"The chunk file is malformed: {what}.")

    rule(isinstance(document, dict), "chunk.json is not an object")
    rule(document.get("version") == VERSION, f"its version is not {VERSION}")
    rule(document.keys() == _CHUNK_FIELDS, "chunk.json has missing or unknown fields")
    rule(_is_text(document["chunk_id"], _ID), "its id is not plain")
    rule(_is_text(document["service"], _WORD), "its service is not a plain name")
    rule(_is_text(document["model"], _WORD), "its model is not a plain name")
    rule(document["digest"] is None or _is_text(document["digest"], _DIGEST), "its digest is none")
    rule(isinstance(document["is_shrunk"], bool), "it does not say whether its inputs are shrunk")
    items = document["items"]
    rule(isinstance(items, list) and 0 < len(items) <= MAX_ITEMS, f"it does not have 1 to {MAX_ITEMS} items")
    for number, item in enumerate(items):
        rule(isinstance(item, dict) and item.keys() == {"number", "inputs", "params"}, "an item has other fields")
        rule(_is_count(item["number"]) and item["number"] == number, "its items are not numbered from 0 on")
        rule(_are_files(item["inputs"]) and len(item["inputs"]) > 0, "an item's inputs are not plain")
        rule(isinstance(item["params"], dict) and _is_shallow(item["params"]), "an item's params are no object")


def check_results(document: Any) -> None:
    """Check a results.json. :raises MalformedResults: names the rule that it breaks."""

    def rule(holds: bool, what: str) -> None:
        if not holds:
            raise MalformedResults(f"The results file is malformed: {what}.")

    rule(isinstance(document, dict), "results.json is not an object")
    rule(document.get("version") == VERSION, f"its version is not {VERSION}")
    rule(document.keys() == _RESULTS_FIELDS, "results.json has missing or unknown fields")
    rule(_is_text(document["chunk_id"], _ID) and _is_text(document["model"], _WORD), "its id or model is not plain")
    rule(_is_text(document["digest"], _DIGEST), "its digest is none")
    versions = document["versions"]
    rule(isinstance(versions, dict) and len(versions) <= 20, "its versions are no object")
    rule(all(isinstance(v, str) and len(k) <= 40 and len(v) <= 100 for k, v in versions.items()), "a version is odd")
    rule(_is_text(document["precision"], _WORD), "its precision is not plain")
    rule(isinstance(document["cpu"], str) and len(document["cpu"]) <= 200, "its cpu is not a short text")
    rule(_is_seconds(document["load_seconds"]), "its load_seconds are none")
    rule(_is_count(document["peak_memory_bytes"]), "its peak_memory_bytes are none")
    rule(isinstance(document["items"], list) and len(document["items"]) <= MAX_ITEMS, "it has too many items")
    for item in document["items"]:
        rule(isinstance(item, dict) and isinstance(item.get("ok"), bool), "an item does not say ok or not")
        rule(item.keys() - {"output", "files", "error"} == {"number", "ok", "seconds"}, "an item has other fields")
        rule(_is_count(item["number"]) and _is_seconds(item["seconds"]), "an item's number or seconds are odd")
        if item["ok"]:
            rule("error" not in item and {"output", "files"} <= item.keys(), "an answered item has other fields")
            rule(_are_files(item["files"]), "an item's files are not plain")
            rule(_is_shallow(item["output"]), "an output is nested too deep")
        else:
            error = item.get("error")
            rule(item.keys().isdisjoint({"output", "files"}), "a failed item has an output")
            rule(isinstance(error, dict) and error.keys() == {"code", "reason", "permanent"}, "an error is odd")
            rule(_is_text(error["code"], _WORD) and isinstance(error["permanent"], bool), "an error's code is odd")
            rule(isinstance(error["reason"], str) and len(error["reason"]) <= MAX_REASON, "a reason is too long")


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
