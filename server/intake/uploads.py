"""An upload: the picture and the fields beside it, read from a request with every length bounded.

Called by the views. Whoever sends too much is told so as soon as can be: a declared length is checked before the first
byte, an undeclared one (chunked transfer) while reading. Nothing here touches the disk: a picture is at most a
few megabytes, and temporary files would cost more than they save. Bytes are not looked at; `imaging.py` does that.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from flask import Request
from werkzeug.http import parse_options_header

from provider_image.errors import EmptyImage, MalformedRequest, TooManyBytes
from server.errors import UnsupportedMediaType
from server.intake import multipart

#: What a form may be larger than its picture: boundaries, headers, and the fields beside it.
FORM_ALLOWANCE_BYTES = 64 * 1024
#: Longest file name that is kept, in characters.
MAX_NAME_LENGTH = 200
#: Largest body of a request that carries only fields.
MAX_FIELD_BYTES = 8192
_BUFFER_BYTES = 64 * 1024
#: What is read and thrown away of a body that is too large and did not say so before.
_MAX_DISCARDED_BYTES = 32 * 1024 * 1024

_RAW_HINT = (
    "The raw bytes are taken with an image content type, for example: "
    "curl -H 'Content-Type: image/jpeg' --data-binary @kitten.jpg URL"
)
_FORM_HINT = "Send the picture as a form: curl -F image=@kitten.jpg URL"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What came in."""

    #: The picture's bytes, not empty, not yet looked at.
    data: bytes
    #: The client's file name, cleaned; only shown.
    name: str | None = None
    #: The other fields of the form.
    fields: Mapping[str, str] = field(default_factory=dict)
    #: True when the picture came as a plain field without a file name: most likely a forgotten @.
    is_plain_field: bool = False


class ActiveReads:
    """Who is at it now, and since when; so that the server can tell that all threads wait for slow clients."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: dict[object, float] = {}

    @contextlib.contextmanager
    def track(self) -> Iterator[None]:
        """Count the caller while it is inside."""
        key = object()
        with self._lock:
            self._since[key] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._since[key]

    def count_older_than(self, seconds: float) -> int:
        """Count those who have been at it for so long."""
        limit = time.monotonic() - seconds
        with self._lock:
            return sum(since <= limit for since in self._since.values())


def read_upload(request: Request, *, max_image_bytes: int, active_reads: ActiveReads) -> Upload:
    """Read the picture from a form's field `image` or from the raw body.

    :raises TooManyBytes: :raises EmptyImage: :raises MalformedRequest: :raises UnsupportedMediaType:
    """
    kind, options = parse_options_header(request.environ.get("CONTENT_TYPE", ""))
    kind = kind.lower()
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType(
            f"A body with a Content-Encoding is not taken: pictures are small already. {_FORM_HINT}"
        )
    if kind == "multipart/form-data":
        body = _read_body(request, max_image_bytes + FORM_ALLOWANCE_BYTES, max_image_bytes, active_reads)
        if not body:
            raise EmptyImage(f"The request has no body. {_FORM_HINT}")
        return _from_form(multipart.split(body, options.get("boundary", "")), max_image_bytes)
    if kind.startswith("image/") or kind in ("", "application/octet-stream"):
        body = _read_body(request, max_image_bytes, max_image_bytes, active_reads)
        if not body:
            raise EmptyImage()
        return Upload(data=body)
    if kind == "application/x-www-form-urlencoded":
        raise UnsupportedMediaType(f"curl -d and --data send a form without files. {_FORM_HINT} {_RAW_HINT}")
    raise UnsupportedMediaType(f"The content type {kind[:80]!r} is not taken. {_FORM_HINT} {_RAW_HINT}")


def read_fields(request: Request, *, active_reads: ActiveReads) -> dict[str, str]:
    """Read the fields of a request that carries no picture: the query, and a urlencoded body if there is one.

    :raises MalformedRequest: :raises TooManyBytes:
    """
    fields = query_fields(request)
    kind, _ = parse_options_header(request.environ.get("CONTENT_TYPE", ""))
    if request.method == "POST" and kind.lower() == "application/x-www-form-urlencoded":
        body = _read_body(request, MAX_FIELD_BYTES, MAX_FIELD_BYTES, active_reads)
        try:
            pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELD_BYTES // 16)
        except ValueError as error:
            raise MalformedRequest("The fields cannot be read. Put them into the URL, for example ?top=3") from error
        _add_fields(fields, pairs)
    return fields


def read_json(request: Request, *, active_reads: ActiveReads) -> dict[str, str]:
    """Read the fields of a request whose body is a JSON object of plain values; a number or a yes becomes its text.

    :raises MalformedRequest: :raises TooManyBytes:
    """
    body = _read_body(request, MAX_FIELD_BYTES, MAX_FIELD_BYTES, active_reads)
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedRequest("The body is not JSON.") from error
    if not isinstance(found, dict):
        raise MalformedRequest("The body must be a JSON object.")
    fields: dict[str, str] = {}
    for name, value in found.items():
        if not isinstance(value, str | int | float):
            raise MalformedRequest(f"{name[:64]!r} must be a text, a number, true or false.")
        fields[name] = value if isinstance(value, str) else json.dumps(value)
    return fields


def query_fields(request: Request) -> dict[str, str]:
    """Read the fields of the query string. :raises MalformedRequest: one stands there twice."""
    fields: dict[str, str] = {}
    if request.query_string:
        _add_fields(fields, list(request.args.items(multi=True)))
    return fields


def clean_name(name: str | None) -> str | None:
    """Make a label of a client's file name: no folders, no control characters, at most LONGEST_NAME characters."""
    if not name:
        return None
    base = name.replace("\\", "/").rpartition("/")[2]
    # Category C: controls, but also the marks that turn the direction of writing, and lone surrogates.
    label = "".join(character for character in base if unicodedata.category(character)[0] != "C").strip()
    return label[:MAX_NAME_LENGTH] or None


def _from_form(parts: list[multipart.Part], max_image_bytes: int) -> Upload:
    images = [part for part in parts if part.name == "image"]
    others = [part for part in parts if part.name != "image"]
    if not images:
        field_names = ", ".join(repr(part.name[:40]) for part in others) or "none"
        raise MalformedRequest(f"The form has no field `image` (fields there: {field_names}). {_FORM_HINT}")
    if len(images) > 1:
        raise MalformedRequest(f"The form has {len(images)} fields `image`. Send one picture a request.")
    fields: dict[str, str] = {}
    for part in others:
        if part.filename is not None:
            raise MalformedRequest(
                f"The field {part.name[:40]!r} holds a file. Only the field `image` does. {_FORM_HINT}"
            )
        if len(part.data) > MAX_FIELD_BYTES:
            raise MalformedRequest(f"The field {part.name[:40]!r} is too long.")
        _add_fields(fields, [(part.name, part.data.decode("utf-8", "replace"))])
    image = images[0]
    if not image.data:
        raise EmptyImage()
    if len(image.data) > max_image_bytes:
        raise too_many_bytes(max_image_bytes)
    return Upload(
        data=image.data,
        name=clean_name(image.filename),
        fields=fields,
        is_plain_field=image.filename is None,
    )


def too_many_bytes(max_image_bytes: int) -> TooManyBytes:
    """Say how much is taken."""
    return TooManyBytes(
        f"The image file is too large. At most {max_image_bytes / 2**20:g} MB ({max_image_bytes} bytes) are taken: "
        "a smaller size or a stronger JPEG compression helps."
    )


def _read_body(request: Request, limit: int, max_image_bytes: int, active_reads: ActiveReads) -> bytes:
    """Read a body of at most `limit` bytes."""
    declared = request.content_length
    if declared is not None and declared > limit:
        raise too_many_bytes(max_image_bytes)
    stream = request.environ["wsgi.input"]
    if declared is None and not request.environ.get("wsgi.input_terminated"):
        return b""  # neither a length nor chunks: there is no body
    with active_reads.track():
        if declared is not None:
            body: bytes = stream.read(declared)
            if len(body) < declared:
                raise MalformedRequest(
                    f"The connection ended after {len(body)} of {declared} bytes. Send the request again."
                )
            return body
        pieces: list[bytes] = []
        size = 0
        while piece := stream.read(_BUFFER_BYTES):
            size += len(piece)
            if size > limit:
                # A connection that is closed while its client still sends is reset, and the client sees that instead
                # of the answer. Most are about to end; who is not is not waited for.
                while size < limit + _MAX_DISCARDED_BYTES and (piece := stream.read(_BUFFER_BYTES)):
                    size += len(piece)
                raise too_many_bytes(max_image_bytes)
            pieces.append(piece)
    return b"".join(pieces)


def _add_fields(fields: dict[str, str], pairs: list[tuple[str, str]]) -> None:
    for name, value in pairs:
        if name in fields:
            raise MalformedRequest(f"{name[:64]!r} stands there twice. Send it once.")
        fields[name] = value
