"""The files of an output: what a provider may send as JSON and as text, and what checking that costs."""

from __future__ import annotations

import tracemalloc

import pytest

from provider_image.errors import MalformedResults
from provider_image.service import MAX_JSON_VALUES, OutputFile, check_files

MEGABYTE = 1 << 20
#: Name -> a media type, a file, and whether it is of the type.
FILES = {
    "JSON": ("application/json", '{"a": [1, 2.5, "ä", null, {"b": {}}]}'.encode(), True),
    "JSON with many numbers": ("application/json", b"[" + b"1," * (MAX_JSON_VALUES - 1) + b"1]", True),
    "JSON with too many lists": ("application/json", b"[" + b"[]," * MAX_JSON_VALUES + b"[]]", False),
    "JSON with too many fields": ("application/json", b'[{"a":1' + b',"a":1' * MAX_JSON_VALUES + b"}]", False),
    "JSON that is nested too deep": ("application/json", b"[" * 500_000 + b"]" * 500_000, False),
    "JSON in UTF-16": ("application/json", '{"a": 1}'.encode("utf-16"), False),
    "half of JSON": ("application/json", b'{"a": ', False),
    "text": ("text/plain", b"a" * (MEGABYTE - 1) + "ä".encode() * MEGABYTE, True),
    "half a character": ("text/plain", b"a" * (MEGABYTE - 1) + "ä".encode()[:1], False),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_an_output_is_checked_in_little_memory(name: str) -> None:
    media_type, data, is_valid = FILES[name]
    outputs = {"file": OutputFile(help="A file.", media_type=media_type, max_bytes=64 * MEGABYTE)}
    reason = ""

    tracemalloc.start()
    try:
        check_files(outputs, {"file": data})
    except MalformedResults as error:
        reason = error.reason
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert bool(reason) is not is_valid, reason
    assert peak < 3 * len(data) + 16 * MEGABYTE
