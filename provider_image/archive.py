"""The zip format of chunk and results files: bounded, uncompressed, written atomically.

Called by `chunk.py` only. Nothing is compressed, which excludes zip bombs, and every length is checked against a limit
before it is read.
"""

from __future__ import annotations

import contextlib
import io
import json
import secrets
import shutil
import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from provider_image.errors import DAMAGED_FILE_ERRORS, ChunkError
from provider_image.schemas import MAX_BYTES, MAX_FILES, MAX_ITEMS, parse_json

#: Largest chunk.json or results.json.
MAX_JSON_BYTES = 1024 * 1024
#: Largest size of the headers and the directory of a zip.
_OVERHEAD_BYTES = 256 * 1024
_ZIP_ERRORS = (zipfile.BadZipFile, *DAMAGED_FILE_ERRORS)


class Archive:
    """An untrusted zip: its size is limited before Python's zipfile reads it, and entries are read up to their size."""

    def __init__(self, path: Path, document_name: str, error: type[ChunkError], file: BinaryIO | None = None) -> None:
        self._error, self._path, self._document_name = error, path, document_name
        self._lock = threading.Lock()
        try:
            self._file: BinaryIO = path.open("rb") if file is None else file
        except OSError as cause:
            raise error(f"{path.name} cannot be opened: {cause.strerror}") from cause
        try:
            self._check_end()
            self._zip = zipfile.ZipFile(self._file)
            self._infos = self._zip.infolist()
            self._check_entries()
            self.document = parse_json(self._read_entry(document_name, MAX_JSON_BYTES), error, document_name)
        except _ZIP_ERRORS as cause:
            self._file.close()
            raise error(f"{path.name} is not a valid zip: {cause}") from cause
        except BaseException:
            self._file.close()
            raise

    def _check_end(self) -> None:
        """Limit the directory before zipfile reads it: 64 MB of it would become a million objects."""
        size = self._file.seek(0, io.SEEK_END)
        if size > MAX_BYTES + MAX_JSON_BYTES + _OVERHEAD_BYTES:
            raise self._error(f"{self._path.name} has {size} bytes, more than a chunk may have.")
        self._file.seek(max(0, size - 42))
        tail = self._file.read(42)
        if len(tail) < 22 or tail[-22:-18] != b"PK\x05\x06":
            raise self._error(f"{self._path.name} is not a zip, is truncated, or has data after its end.")
        entries, length = struct.unpack_from("<HL", tail, len(tail) - 12)
        if entries > MAX_ITEMS * MAX_FILES + 1 or length > _OVERHEAD_BYTES or tail[:4] == b"PK\x06\x07":
            raise self._error(f"{self._path.name} lists more files than a chunk may have.")

    def _check_entries(self) -> None:
        names = [info.filename for info in self._infos]
        if len(set(names)) != len(names) or len(names) > MAX_ITEMS * MAX_FILES + 1:
            raise self._error(f"{self._path.name} has a file twice, or too many files.")
        for info in self._infos:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1 or info.file_size != info.compress_size:
                raise self._error(f"{self._path.name} has compressed or encrypted files.")
        if sum(info.file_size for info in self._infos) > MAX_BYTES + MAX_JSON_BYTES:
            raise self._error(f"{self._path.name} declares more bytes than a chunk may have.")

    def check_files(self, expected: Mapping[str, int]) -> None:
        """Check that the zip contains exactly the document and these files, with these sizes."""
        found = {info.filename: info.file_size for info in self._infos if info.filename != self._document_name}
        if found != expected:
            raise self._error(f"{self._path.name} has other files than its {self._document_name} lists.")
        if sum(expected.values()) > MAX_BYTES:
            raise self._error(f"{self._path.name} has more bytes than a chunk may have.")

    def read(self, name: str, size: int) -> bytes:
        """Read a file that must have this size. :raises: the archive's error, if it has not or is damaged."""
        try:
            data = self._read_entry(name, size)
        except _ZIP_ERRORS as cause:
            raise self._error(f"{self._path.name} is damaged at {name}: {cause}") from cause
        if len(data) != size:
            raise self._error(f"{self._path.name} has another size at {name} than declared.")
        return data

    def _read_entry(self, name: str, max_bytes: int) -> bytes:
        with self._lock, self._zip.open(name) as entry:
            data = entry.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise self._error(f"{self._path.name} has more bytes at {name} than declared.")
        return data

    def close(self) -> None:
        """Close the file."""
        self._zip.close()
        self._file.close()


@contextlib.contextmanager
def atomic_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a new zip under a temporary name beside `path`, and rename it to `path` when it is complete."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED, allowZip64=False) as archive:
            yield archive
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # dated 1980: the time of an upload is private
    entry.external_attr = 0o600 << 16
    return entry


def add(archive: zipfile.ZipFile, name: str, source: Path | bytes) -> int:
    """Add a file uncompressed, streamed if it comes from a path, and return its size."""
    if isinstance(source, bytes):
        archive.writestr(_entry(name), source)
        return len(source)
    entry = _entry(name)
    with source.open("rb") as file, archive.open(entry, "w") as target:
        shutil.copyfileobj(file, target, 1024 * 1024)
    return entry.file_size


def add_json(archive: zipfile.ZipFile, name: str, document: Any, error: type[ChunkError]) -> None:
    """Add a JSON document. :raises error: it is too long, or not representable in JSON."""
    try:
        raw = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, TypeError, RecursionError) as cause:
        raise error(f"{name} cannot be written: {cause}") from cause
    if len(raw) > MAX_JSON_BYTES:
        raise error(f"{name} would have more than {MAX_JSON_BYTES} bytes.")
    archive.writestr(_entry(name), raw)
