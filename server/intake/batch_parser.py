"""The body of a batch: a form, a zip or lines, parsed item by item.

Called by `server/intake/accept.py`. A body is first written to an unnamed file in the home, which vanishes with the
process; then it is parsed with one image in memory at a time. Every length is bounded before anything is read: the
body's, an image's, the unpacked size of a zip, the number of items, a line's. Names in a zip are only labels; nothing
is ever unpacked to them.
"""

from __future__ import annotations

import csv
import io
import json
import struct
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio import multipart as forms

from provider_image.errors import BadInput, BrokenImage, EmptyImage, MalformedRequest, MlgError, NotARow, TooManyBytes
from provider_image.features.normal_form import normalise
from provider_image.rows import find_delimiter
from provider_image.service import Input
from server.errors import LengthMissing, TooManyItems, UnsupportedMediaType
from server.intake.uploads import (
    JSON_EXAMPLES,
    ActiveReads,
    BodyDigest,
    clean_name,
    from_json,
    json_bytes,
    read_pieces,
    too_many_bytes,
)
from store.batches import DuplicateClientId
from store.images import as_store_error

#: Images of one batch.
MAX_ITEMS = 10_000
#: Longest client id of an item, in characters.
MAX_CLIENT_ID_LENGTH = 200
#: Headers of one part of a form, and the text before the first.
_MAX_HEADER_BYTES = 64 * 1024
#: A line of JSON with a URL; one with an input may have that much more.
_MAX_LINE_BYTES = 16 * 1024
#: A zip's directory: 800 bytes for each of ten thousand entries.
_MAX_DIRECTORY_BYTES = 8 * 1024 * 1024
_ENTRY = b"PK\x01\x02"
_END_OF_DIRECTORY = b"PK\x05\x06"
_ZIP64_LOCATOR = b"PK\x06\x07"
_USAGE = (
    "Send a form with many fields `image`, a zip (Content-Type: application/zip), or JSON lines "
    '(Content-Type: application/jsonl) of {"client_id": "...", "url": "..."}'
)
_PLAIN_USAGE = (
    "Send JSON lines (Content-Type: application/jsonl) like {example}, or a CSV with a line of column names "
    "(Content-Type: text/csv)"
)


@dataclass(frozen=True, kw_only=True)
class BatchItem:
    """One item of a batch, not yet checked: the bytes of its input, or its URL, or why it cannot be read."""

    position: int
    #: Unique in the batch.
    client_id: str
    #: The file name, cleaned.
    name: str | None = None
    data: bytes | None = None
    url: str | None = None
    error: MlgError | None = None


@dataclass(frozen=True, kw_only=True)
class SharedInputs:
    """The inputs that all items of a batch have beside their own: each is sent once, as a field of the form."""

    #: What the service takes beside its first input, by name.
    inputs: Mapping[str, Input]
    #: What was sent, not yet checked.
    data: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, data: bytes, max_bytes: int) -> None:
        """Keep an input. :raises MalformedRequest: it was sent before. :raises TooManyBytes:"""
        if name in self.data:
            raise MalformedRequest(f"The form has the field `{name}` twice. It is the same for all items of a batch.")
        if len(data) > max_bytes:
            raise too_many_bytes(max_bytes)
        self.data[name] = data


def spool(
    request: Request,
    *,
    folder: Path,
    max_bytes: int,
    too_large: MlgError,
    active_reads: ActiveReads,
    digest: BodyDigest | None = None,
) -> IO[bytes]:
    """Write a request's body to a temporary file; the caller closes it.

    :param too_large: raised for a body of more than `max_bytes`.
    :param digest: gets the body.
    :raises MalformedRequest: it ends too early, or is empty. :raises StoreError:
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("A body with a Content-Encoding is not accepted. Send a zip as application/zip.")
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the caller's
        try:
            for piece in read_pieces(request, max_bytes, too_large, active_reads):
                file.write(piece)
                if digest is not None:
                    digest.update(piece)
            if not file.tell():
                raise MalformedRequest(f"The request has no body. {_USAGE}")
            file.seek(0)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise as_store_error(error, folder) from error
    return file


def detect_format(request: Request, one: Input) -> tuple[str, str]:
    """Return what a body is: form, zip, urls, lines (inputs as JSON) or csv; and a form's boundary.

    :param one: the first input of the service.
    :raises UnsupportedMediaType: :raises LengthMissing: of lines, which have no end of their own.
    """
    is_plain = one.kind in JSON_EXAMPLES
    kind, options = parse_options_header(request.environ.get("CONTENT_TYPE", ""))
    kind = kind.lower()
    if kind == "multipart/form-data":
        return "form", options.get("boundary", "")
    if kind in ("application/zip", "application/x-zip-compressed"):
        return "zip", ""
    is_csv = kind == "text/csv" and is_plain
    if is_csv or kind in ("application/jsonl", "application/x-ndjson", "application/ndjson", "application/x-jsonlines"):
        if request.content_length is None:
            raise LengthMissing()
        return "csv" if is_csv else "lines" if is_plain else "urls", ""
    usage = _PLAIN_USAGE.format(example=f'{{"{one.kind}": {JSON_EXAMPLES[one.kind]}}}') if is_plain else _USAGE
    raise UnsupportedMediaType(f"The content type {kind[:80]!r} is not accepted. {usage}")


def parse_items(
    file: IO[bytes],
    kind: str,
    boundary: str,
    input_name: str,
    one: Input,
    *,
    shared: SharedInputs,
    folder: Path,
    max_image_bytes: int,
    max_bytes: int,
) -> Iterator[BatchItem]:
    """Iterate over a body's items, in order.

    :param kind: as `detect_format` returns it.
    :param input_name: the field of a form or a line that has an item.
    :param one: the input with this name.
    :param shared: gets the further inputs that a form has.
    :param max_bytes: limit for the unpacked size of a zip.
    :raises MalformedRequest: :raises TooManyItems: :raises TooManyBytes: :raises DuplicateClientId:
        The whole batch is invalid then.
    """
    if kind == "form":
        found = _form_items(file, boundary, input_name, shared, folder, max_image_bytes, max_bytes)
    elif kind == "zip":
        found = _zip_items(file, max_image_bytes, max_bytes)
    elif kind == "csv":
        found = _csv_items(file, input_name, one)
    else:
        found = _line_items(file, input_name, one if kind == "lines" else None)
    positions: dict[str, int] = {}
    for item in found:
        if item.position >= MAX_ITEMS:
            raise TooManyItems()
        earlier = positions.setdefault(item.client_id, item.position)
        if earlier != item.position:
            raise DuplicateClientId(
                f"The client id {item.client_id!r} is given twice: items {earlier} and {item.position}, counted "
                "from 0. Give each image its own id."
            )
        yield item
    if not positions:
        raise MalformedRequest(f"The batch has no {one.kind}. {_USAGE if one.kind == 'image' else ''}".strip())


def _shorten(filename: str | None) -> str:
    """Return the end of a file name that serves as an id: a long name must not refuse the whole batch."""
    return (filename or "")[-MAX_CLIENT_ID_LENGTH:]


def _client_id(given: str | None, position: int) -> str:
    """Clean an item's id; its position if there is none. :raises MalformedRequest: too long."""
    label = "".join(character for character in given or "" if unicodedata.category(character)[0] != "C").strip()
    if len(label) > MAX_CLIENT_ID_LENGTH:
        raise MalformedRequest(f"The client id of item {position} is longer than {MAX_CLIENT_ID_LENGTH} characters.")
    return label or str(position)


def body_too_large(max_bytes: int) -> TooManyBytes:
    """Build the error for a batch over the limit."""
    return TooManyBytes(f"A batch takes at most {max_bytes} bytes (MLG_MAX_BATCH_BYTES). Send several batches.")


# Forms


def _form_items(
    file: IO[bytes],
    boundary: str,
    input_name: str,
    shared: SharedInputs,
    folder: Path,
    max_image_bytes: int,
    max_bytes: int,
) -> Iterator[BatchItem]:
    position = 0
    given: str | None = None
    for name, filename, data in form_parts(file, boundary, folder, max_image_bytes):
        if name == "archive":
            with data:
                if position or given:
                    raise MalformedRequest("A form has either one field `archive` or fields `image`.")
                for item in _zip_items(data, max_image_bytes, max_bytes):
                    position = item.position + 1
                    yield item
        elif name == "client_id":
            if given is not None:
                raise MalformedRequest("A field `client_id` must come before the field `image` that it names.")
            given = data.read(_MAX_LINE_BYTES).decode("utf-8", "replace")
        elif name == input_name:
            content = data.read(max_image_bytes + 1)
            is_too_large = len(content) > max_image_bytes
            yield BatchItem(
                position=position,
                client_id=_client_id(given or _shorten(filename), position),
                name=clean_name(filename),
                data=None if is_too_large else content,
                error=too_many_bytes(max_image_bytes) if is_too_large else None,
            )
            position, given = position + 1, None
        elif name in shared.inputs:
            shared.add(name, data.read(max_image_bytes + 1), max_image_bytes)
        else:
            fields = ", ".join((input_name, *shared.inputs, "client_id", "archive"))
            raise MalformedRequest(f"The form has a field {name[:40]!r}. Fields: {fields}; parameters go into the URL.")
    if given is not None:
        raise MalformedRequest(
            "A field `client_id` must come before the field `image` that it names; the last one does not."
        )


def form_parts(
    file: IO[bytes], boundary: str, folder: Path, max_image_bytes: int
) -> Generator[tuple[str, str | None, IO[bytes]], None, None]:
    """Iterate over the parts of a form: name, file name, and bytes; of an image over the limit only the beginning."""
    if not 0 < len(boundary) <= 200:
        raise MalformedRequest("The Content-Type of a form needs a boundary.")
    decoder = forms.MultipartDecoder(boundary.encode("latin-1", "replace"), max_parts=2 * MAX_ITEMS + 2)
    name, filename, size = "", None, 0
    held: IO[bytes] = io.BytesIO()
    try:
        while True:
            event = decoder.next_event()
            if isinstance(event, forms.NeedData):
                if decoder.state is forms.State.EPILOGUE:
                    return  # what follows the form is ignored, and must not fill the memory
                if (
                    decoder.state in (forms.State.PREAMBLE, forms.State.PART)
                    and len(decoder.buffer) > _MAX_HEADER_BYTES
                ):
                    raise MalformedRequest("The form has a part without an end of headers.")
                decoder.receive_data(file.read(_MAX_HEADER_BYTES) or None)
            elif isinstance(event, forms.Field | forms.File):
                name, size = event.name or "", 0
                filename = event.filename if isinstance(event, forms.File) else None
                is_archive = name == "archive"
                held = tempfile.TemporaryFile(dir=folder) if is_archive else io.BytesIO()  # noqa: SIM115 - see below
            elif isinstance(event, forms.Data):
                if name == "archive" or size <= max_image_bytes:
                    held.write(event.data)
                    size += len(event.data)
                if not event.more_data:
                    held.seek(0)
                    yield name, filename, held
            elif isinstance(event, forms.Epilogue):
                return
    except (ValueError, RequestEntityTooLarge) as error:
        raise MalformedRequest(f"The form cannot be read ({error}). Let the client build it.") from error
    finally:
        held.close()


# Zips


def _zip_items(file: IO[bytes], max_image_bytes: int, max_bytes: int) -> Iterator[BatchItem]:
    check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if _is_regular_file(entry)]
            if len(entries) > MAX_ITEMS:
                raise TooManyItems()
            if sum(entry.file_size for entry in entries) > max_bytes:
                raise TooManyBytes(f"The zip unpacks to more than {max_bytes} bytes (MLG_MAX_BATCH_BYTES).")
            for position, entry in enumerate(entries):
                yield _zip_item(archive, entry, position, max_image_bytes)
    except (zipfile.BadZipFile, struct.error, NotImplementedError, OSError, ValueError) as error:
        raise MalformedRequest(f"The zip cannot be read ({error}).") from error


def check_directory(file: IO[bytes]) -> None:
    """Check the end of a zip before its directory is read. :raises MalformedRequest: :raises TooManyItems:"""
    size = file.seek(0, io.SEEK_END)
    start = max(0, size - 22 - 65535 - 20)
    file.seek(start)
    tail = file.read()
    offset = len(tail) - 22
    if tail[offset : offset + 4] != _END_OF_DIRECTORY or tail[-2:] != b"\0\0":
        offset = tail.rfind(_END_OF_DIRECTORY)
    if offset < 0 or len(tail) < offset + 22:
        raise MalformedRequest("The zip has no end: it is cut short, or not a zip.")
    (directory_bytes,) = struct.unpack_from("<L", tail, offset + 12)
    if tail[max(0, offset - 20) : offset].startswith(_ZIP64_LOCATOR):
        raise MalformedRequest("A zip in the ZIP64 format is not accepted. Send several smaller ones.")
    too_many = TooManyItems("The zip has too many entries, or their names are too long. Send several smaller ones.")
    if directory_bytes > _MAX_DIRECTORY_BYTES:
        raise too_many
    # The number of entries that a zip states is not what is read, and each becomes an object of half a kilobyte.
    file.seek(max(0, start + offset - directory_bytes))
    if file.read(directory_bytes).count(_ENTRY) > 2 * MAX_ITEMS:
        raise too_many
    file.seek(0)


def _is_regular_file(entry: zipfile.ZipInfo) -> bool:
    """Leave out folders, and the files that operating systems add."""
    names = entry.filename.split("/")
    return not entry.is_dir() and names[0] != "__MACOSX" and names[-1] not in (".DS_Store", "Thumbs.db", "desktop.ini")


def _zip_item(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, position: int, max_image_bytes: int) -> BatchItem:
    data: bytes | None = None
    error: MlgError | None = None
    if entry.file_size > max_image_bytes:
        error = too_many_bytes(max_image_bytes)
    elif entry.flag_bits & 0x1:
        error = BrokenImage("This file of the zip is encrypted.")
    elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        error = BrokenImage("The compression of this file of the zip is not supported. Use store or deflate.")
    else:
        try:
            with archive.open(entry) as member:
                data = member.read(max_image_bytes + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as failure:
            error = BrokenImage(f"This file of the zip is damaged ({failure}).")
    return BatchItem(
        position=position,
        client_id=_client_id(_shorten(entry.filename), position),
        name=clean_name(entry.filename),
        data=data,
        error=error,
    )


# Lines


def _line_items(file: IO[bytes], input_name: str, one: Input | None) -> Iterator[BatchItem]:
    """Read lines. :param one: the input that each has; None if they have the URLs of images."""
    position, max_bytes = 0, _MAX_LINE_BYTES + (0 if one is None else json_bytes(one))
    while line := file.readline(max_bytes + 1):
        if len(line) > max_bytes:
            raise MalformedRequest(f"Line {position + 1} is longer than {max_bytes} bytes.")
        if not line.strip():
            continue
        yield _line_item(line, position, input_name, one)
        position += 1


def _line_item(line: bytes, position: int, input_name: str, one: Input | None) -> BatchItem:
    field = "url" if one is None else input_name
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(f"Line {position + 1} is not JSON.") from error
    kind: type = dict if one is not None and one.kind == "row" else str
    is_valid = isinstance(found, dict) and found.keys() <= {"client_id", field} and isinstance(found.get(field), kind)
    if not is_valid or not isinstance(found.get("client_id", ""), str | int):
        example = '"https://..."' if one is None else JSON_EXAMPLES[one.kind]
        raise MalformedRequest(f'Line {position + 1} is not like {{"client_id": "a", "{field}": {example}}}.')
    given = found.get("client_id")
    client_id = _client_id(None if given is None else str(given), position)
    if one is not None:
        return _plain_item(position, client_id, one, found[field])
    url = found["url"]
    return BatchItem(
        position=position,
        client_id=client_id,
        # As it was sent; unlike the name of a single image it is not decoded.
        name=clean_name(url.partition("?")[0]),
        url=url,
        error=None if url else EmptyImage("The URL is empty."),
    )


def _plain_item(position: int, client_id: str, one: Input, value: object) -> BatchItem:
    """Make the item of a row or a text, or of the reason why it cannot be one."""
    try:
        return BatchItem(position=position, client_id=client_id, data=from_json(one, value))
    except BadInput as error:
        return BatchItem(position=position, client_id=client_id, error=error)


# CSV


def _csv_items(file: IO[bytes], input_name: str, one: Input) -> Iterator[BatchItem]:
    """Read a CSV: the first line names the columns; those of a text are the input's name and perhaps `client_id`."""
    lines = _CsvLines(file, _MAX_LINE_BYTES + json_bytes(one))
    try:
        header = lines.read()
        reader = csv.reader(lines, delimiter=find_delimiter(header), strict=True)
        names = next(csv.reader([header], delimiter=find_delimiter(header), strict=True), [])
        # As training reads them.
        columns = [normalise(name).strip() for name in names]
        if len(set(columns)) != len(columns) or "" in columns:
            raise MalformedRequest("The first line of the CSV must name each column, each with its own name.")
        if one.kind == "text" and not {input_name} <= set(columns) <= {input_name, "client_id"}:
            raise MalformedRequest(f"The CSV must have the column {input_name!r}, and may have the column 'client_id'.")
        lines.size = position = 0
        for cells in reader:
            lines.size = 0
            if not cells:
                continue
            row: dict[str, str] = dict(zip(columns, cells, strict=False))
            client_id = _client_id(row.pop("client_id", None), position)
            if len(cells) != len(columns):
                error = NotARow(f"The line has {len(cells)} fields, and there are {len(columns)} columns.")
                yield BatchItem(position=position, client_id=client_id, error=error)
            else:
                yield _plain_item(position, client_id, one, row[input_name] if one.kind == "text" else row)
            position += 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise MalformedRequest(f"The CSV cannot be read ({error}). It must be UTF-8.") from error


class _CsvLines:
    """The lines of a CSV, of which one record may have several; its bytes are counted in `size`, which is reset."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes
        self.size = 0
        self._encoding = "utf-8-sig"

    def read(self) -> str:
        """Read a line; empty at the end. :raises MalformedRequest: the record is too long."""
        line = self._file.readline(self._max_bytes + 1)
        self.size += len(line)
        if self.size > self._max_bytes:
            raise MalformedRequest(f"A line of the CSV is longer than {self._max_bytes} bytes.")
        encoding, self._encoding = self._encoding, "utf-8"
        return line.decode(encoding)

    def __iter__(self) -> Iterator[str]:
        return iter(self.read, "")
