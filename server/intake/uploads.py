"""An upload: the inputs and the fields beside them, read from a request with every length bounded.

Called by `server/intake/accept.py` and by views. Too much is refused as early as possible: a declared length is checked
before the first byte, an undeclared one (chunked transfer) while reading. Nothing here touches the disk: an image is at
most a few megabytes, and temporary files would cost more than they save. The inputs' bytes are not looked at;
`server/intake/staging.py` does that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl

import flask
from flask import Request, Response
from werkzeug.http import parse_options_header

from provider_image.errors import EmptyImage, MalformedRequest, MlgError, NotAText, TooManyBytes
from provider_image.service import Input, describe_inputs
from server.auth.guard import current_key_id, get_guard
from server.auth.limits import FairSlots, network_of
from server.auth.memory import hold_bytes
from server.errors import LengthMissing, TooManyUploads, UnsupportedMediaType
from server.intake import multipart

#: Bytes of a form beside its image: boundaries, headers, and the other fields.
FORM_ALLOWANCE_BYTES = 64 * 1024
#: Longest file name that is kept, in characters.
MAX_NAME_LENGTH = 200
#: The header of a request that may be sent again, see `server/intake/idempotency.py`.
IDEMPOTENCY_KEY = "Idempotency-Key"
#: Of the threads that read bodies, one in so many may read for callers without a key, where a key is required.
ANONYMOUS_SHARE = 16
#: Largest body of a request that carries only fields.
MAX_FIELD_BYTES = 8192
_BUFFER_BYTES = 64 * 1024
#: Kinds of inputs that may be written in JSON, with an example of each.
JSON_EXAMPLES = {"row": '{"column": 1.5}', "text": '"some words"'}
#: Bytes of a large body that are read at once.
PIECE_BYTES = 1024 * 1024
#: Bytes that are read and discarded of the body of a request that was refused, and seconds for it.
MAX_DISCARDED_BYTES = 32 * 1024 * 1024
MAX_DISCARD_SECONDS = 10.0

_RAW_HINT = (
    "Raw bytes need an image content type, for example: "
    "curl -H 'Content-Type: image/jpeg' --data-binary @kitten.jpg URL"
)
_FORM_HINT = "Send the image as a form: curl -F image=@kitten.jpg URL"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The inputs of a request as they were received."""

    #: Name of the input -> its bytes, not empty, not yet checked.
    inputs: Mapping[str, bytes]
    #: The client's file name of the first, cleaned; only shown.
    name: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    #: True when the image was sent as a plain field without a file name: most likely an @ was forgotten.
    is_plain_field: bool = False
    #: Of the whole body; None for a request without an idempotency key.
    digest: str | None = None


class ActiveThreads:
    """The threads that are inside of something now, and since when."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: dict[object, float] = {}

    @contextlib.contextmanager
    def track(self) -> Iterator[None]:
        """Count the caller inside of the `with` statement."""
        key = object()
        with self._lock:
            self._since[key] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._since[key]

    def count_older_than(self, seconds: float) -> int:
        """Count those that have been inside for at least so long."""
        limit = time.monotonic() - seconds
        with self._lock:
            return sum(since <= limit for since in self._since.values())


class ActiveReads:
    """The threads that read bodies now. A slow client keeps its thread, so each gets only a share of them.

    :param threads: how many may read at once, for clients with keys or on a server without any.
    """

    def __init__(self, threads: int) -> None:
        self._slots = FairSlots(threads)
        self._anonymous_slots = FairSlots(max(2, threads // ANONYMOUS_SHARE))
        self._threads = ActiveThreads()

    @contextlib.contextmanager
    def track(self) -> Iterator[None]:
        """Count the caller inside of the `with` statement, for the client of the request. :raises TooManyUploads:"""
        client = current_key_id()
        if client is None and not get_guard(flask.current_app).is_open():
            slot = self._anonymous_slots.holding(network_of(flask.request.remote_addr or ""))
        else:
            slot = self._slots.holding(client)
        with slot as is_held, self._threads.track():
            if not is_held:
                raise TooManyUploads()
            yield

    def discard_rest(self, response: Response) -> Response:
        """Read what a client still sends of a request that was refused, within limits; called after each request.

        A connection that is closed while its client sends is reset: the client, or the proxy in front, then sees that
        instead of the response. Who stops sending keeps the thread, as with any body.
        """
        request = flask.request
        has_body = request.content_length or request.environ.get("wsgi.input_terminated")
        # A client that waits for permission to send its body does not send it now.
        if response.status_code < 400 or not has_body or "Expect" in request.headers:
            return response
        stream, left = request.environ["wsgi.input"], MAX_DISCARDED_BYTES
        give_up_at = time.monotonic() + MAX_DISCARD_SECONDS
        # Without a thread for it, or without its client, the connection is closed.
        with contextlib.suppress(MlgError, OSError), self.track():
            while left > 0 and time.monotonic() < give_up_at and (piece := stream.read(_BUFFER_BYTES)):
                left -= len(piece)
        return response

    def count_older_than(self, seconds: float) -> int:
        """Count those that have been reading for at least so long."""
        return self._threads.count_older_than(seconds)


class BodyDigest:
    """The SHA-256 of a body and its content type, without the boundary of a form, in linear time."""

    def __init__(self, kind: str, boundary: str) -> None:
        self._hash = hashlib.sha256(kind.encode("utf-8", "replace") + b"\0")
        is_form = kind == "multipart/form-data" and 0 < len(boundary) <= multipart.MAX_BOUNDARY_LENGTH
        is_form &= boundary.isprintable()
        # It has one CR, its first byte, so that two of them never overlap.
        self._delimiter = b"\r\n--" + boundary.encode("latin-1", "replace") if is_form else b""
        # The first delimiter of a form has no line end before it.
        self._held = b"\r\n" if is_form else b""

    def update(self, piece: bytes) -> None:
        """Add the next piece of the body."""
        if not self._delimiter:
            self._hash.update(piece)
            return
        data, size = self._held + piece, len(self._delimiter)
        last = data.rfind(self._delimiter)
        # What may be the beginning of a delimiter is held back.
        end = max(last + size if last >= 0 else 0, len(data) - size + 1, 0)
        self._hash.update(data[:end].replace(self._delimiter, b"\r\n--"))
        self._held = data[end:]

    def hexdigest(self) -> str:
        """Return the digest; all of the body must have been added."""
        final = self._hash.copy()
        final.update(self._held)
        return final.hexdigest()


def body_digest(request: Request) -> BodyDigest | None:
    """Begin the digest of a request's body; None if no idempotency key needs it."""
    if IDEMPOTENCY_KEY not in request.headers:
        return None
    kind, options = parse_options_header(request.environ.get("CONTENT_TYPE", ""))
    return BodyDigest(kind.lower(), options.get("boundary", ""))


def read_upload(
    request: Request, inputs: Mapping[str, Input], *, max_image_bytes: int, active_reads: ActiveReads
) -> Upload:
    """Read the inputs from the fields of a form, or the first of them from the raw body.

    :param inputs: those of the service; the first is not optional.
    :raises TooManyBytes: :raises EmptyImage: :raises MalformedRequest: :raises UnsupportedMediaType:
    """
    kind, options = parse_options_header(request.environ.get("CONTENT_TYPE", ""))
    kind = kind.lower()
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType(
            f"A body with a Content-Encoding is not accepted: images are compressed already. {_FORM_HINT}"
        )
    if kind == "multipart/form-data":
        limit = len(inputs) * max_image_bytes + FORM_ALLOWANCE_BYTES
        body = _read_body(request, limit, max_image_bytes, active_reads)
        if not body:
            raise EmptyImage(f"The request has no body. {_FORM_HINT}")
        upload = _from_form(multipart.split(body, options.get("boundary", "")), inputs, max_image_bytes)
        return replace(upload, digest=_digest(request, body))
    first, one = next(iter(inputs.items()))
    if one.kind != "row" and (_accepts(one, kind) or kind in ("", "application/octet-stream")):
        body = _read_body(request, max_image_bytes, max_image_bytes, active_reads)
        if not body:
            raise EmptyImage()
        return Upload(inputs={first: body}, digest=_digest(request, body))
    if one.kind != "image":
        raise UnsupportedMediaType(f"The content type {kind[:80]!r} is not accepted. {input_hint(inputs)}")
    if kind == "application/x-www-form-urlencoded":
        raise UnsupportedMediaType(f"curl -d and --data send a form without files. {_FORM_HINT} {_RAW_HINT}")
    raise UnsupportedMediaType(f"The content type {kind[:80]!r} is not accepted. {_FORM_HINT} {_RAW_HINT}")


def input_hint(inputs: Mapping[str, Input]) -> str:
    """Say how to send the inputs of a service that are not only an image."""
    found = [(name, JSON_EXAMPLES[one.kind]) for name, one in inputs.items() if one.kind in JSON_EXAMPLES]
    json_hint = f', or JSON like {{"{found[0][0]}": {found[0][1]}}}' if found else ""
    return f"This model takes {describe_inputs(inputs)}. Send a form with these fields{json_hint}."


def _digest(request: Request, body: bytes) -> str | None:
    digest = body_digest(request)
    if digest is None:
        return None
    digest.update(body)
    return digest.hexdigest()


def _accepts(one: Input, media_type: str) -> bool:
    return media_type in one.media_types or ("image/*" in one.media_types and media_type.startswith("image/"))


def read_fields(request: Request, *, active_reads: ActiveReads) -> dict[str, str]:
    """Read the fields of a request without an image: the query, and a urlencoded body if there is one.

    The body can be read once, so the fields are kept with the request.

    :raises MalformedRequest: :raises TooManyBytes: :raises LengthMissing:
    """
    if "fields" not in flask.g:
        flask.g.fields = _read_fields(request, active_reads)
    return dict(flask.g.fields)


def _read_fields(request: Request, active_reads: ActiveReads) -> dict[str, str]:
    fields = query_fields(request)
    kind, _ = parse_options_header(request.environ.get("CONTENT_TYPE", ""))
    if request.method == "POST" and kind.lower() == "application/x-www-form-urlencoded":
        if request.content_length is None and "Transfer-Encoding" in request.headers:
            raise LengthMissing()
        body = _read_body(request, MAX_FIELD_BYTES, MAX_FIELD_BYTES, active_reads)
        try:
            pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELD_BYTES // 16)
        except ValueError as error:
            raise MalformedRequest("The fields cannot be read. Put them into the URL, for example ?top=3") from error
        add_fields(fields, pairs)
    return fields


def read_json(
    request: Request, *, active_reads: ActiveReads, inputs: Mapping[str, Input] | None = None
) -> tuple[dict[str, str], dict[str, bytes], str | None]:
    """Read a request whose body is a JSON object of plain values; numbers and booleans become text.

    :param inputs: name of a field that holds a table row, an object, or a text -> the input.
    :return: the fields, the inputs, and the digest of the body for a request with an idempotency key.
    :raises MalformedRequest: :raises TooManyBytes:
    """
    inputs = inputs or {}
    limit = MAX_FIELD_BYTES + sum(map(json_bytes, inputs.values()))
    found, digest = read_object(request, limit, active_reads=active_reads)
    fields: dict[str, str] = {}
    given: dict[str, bytes] = {}
    for name, value in found.items():
        if name in inputs:
            given[name] = from_json(inputs[name], value)
        elif not isinstance(value, str | int | float):
            raise MalformedRequest(f"{name[:64]!r} must be a string, a number, true or false.")
        else:
            fields[name] = value if isinstance(value, str) else json.dumps(value)
            if any(unicodedata.category(character) == "Cs" for character in fields[name]):
                raise MalformedRequest(f"{name[:64]!r} has half of a character (a lone surrogate).")
    return fields, given, digest


def read_object(request: Request, max_bytes: int, *, active_reads: ActiveReads) -> tuple[dict[str, Any], str | None]:
    """Read a request whose body is a JSON object of anything.

    :return: the object, and the digest of the body for a request with an idempotency key.
    :raises MalformedRequest: :raises TooManyBytes:
    """
    body, digest = read_bytes(request, max_bytes, active_reads=active_reads)
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedRequest("The body is not JSON.") from error
    if not isinstance(found, dict):
        raise MalformedRequest("The body must be a JSON object.")
    return found, digest


def read_bytes(request: Request, max_bytes: int, *, active_reads: ActiveReads) -> tuple[bytes, str | None]:
    """Read a whole body. :return: it, and its digest for a request with an idempotency key. :raises TooManyBytes:"""
    body = _read_body(request, max_bytes, max_bytes, active_reads)
    return body, _digest(request, body)


def json_bytes(one: Input) -> int:
    """Return the most bytes of an input that is written as JSON, where six may stand for a character of two."""
    return one.max_bytes * (3 if one.kind == "text" else 1)


def from_json(one: Input, value: object) -> bytes:
    """Return the bytes of an input that came as JSON: a row as an object, a text as a string.

    :raises NotAText: it is no string, or has half of a character.
    """
    if one.kind == "row":
        return json.dumps(value).encode()
    if not isinstance(value, str):
        raise NotAText("The text must be a string.")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise NotAText("The text has half of a character (a lone surrogate).") from error


def query_fields(request: Request, *, repeatable: str | None = None) -> dict[str, str]:
    """Read the fields of the query string.

    :param repeatable: a field that may be given several times; it is left out.
    :raises MalformedRequest: another one is given twice.
    """
    fields: dict[str, str] = {}
    if request.query_string:
        add_fields(fields, (pair for pair in request.args.items(multi=True) if pair[0] != repeatable))
    return fields


def add_fields(fields: dict[str, str], pairs: Iterable[tuple[str, str]]) -> None:
    """Add fields to those of another place, or of the same. :raises MalformedRequest: one is given twice."""
    for name, value in pairs:
        if name in fields:
            raise MalformedRequest(f"{name[:64]!r} is given twice. Send it once, in the URL or in the body.")
        fields[name] = value


def clean_name(name: str | None) -> str | None:
    """Make a label of a client's file name: no folders, no control characters, at most MAX_NAME_LENGTH characters."""
    if not name:
        return None
    base = name.replace("\\", "/").rpartition("/")[2]
    # Category C: controls, but also marks that change the direction of writing, and lone surrogates.
    label = "".join(character for character in base if unicodedata.category(character)[0] != "C").strip()
    return label[:MAX_NAME_LENGTH] or None


def _from_form(parts: list[multipart.Part], inputs: Mapping[str, Input], max_image_bytes: int) -> Upload:
    first = next(iter(inputs))
    given: dict[str, multipart.Part] = {}
    others = []
    for part in parts:
        if part.name not in inputs:
            others.append(part)
        elif inputs[part.name].is_optional and not part.filename and not part.data:
            pass  # what a browser sends for a field in which no file was chosen
        elif given.setdefault(part.name, part) is not part:
            count = sum(each.name == part.name for each in parts)
            what = inputs[part.name].kind
            raise MalformedRequest(f"The form has {count} fields `{part.name}`. Send one {what} per request.")
    is_image = inputs[first].kind == "image"
    hint = _FORM_HINT if is_image else input_hint(inputs)
    if first not in given:
        field_names = ", ".join(repr(part.name[:40]) for part in parts) or "none"
        raise MalformedRequest(f"The form has no field `{first}` (its fields: {field_names}). {hint}")
    fields: dict[str, str] = {}
    for part in others:
        if part.filename is not None:
            allowed = f"Only the field `{first}` does. {hint}" if len(inputs) == 1 else hint
            raise MalformedRequest(f"The field {part.name[:40]!r} holds a file. {allowed}")
        if len(part.data) > MAX_FIELD_BYTES:
            raise MalformedRequest(f"The field {part.name[:40]!r} is too long.")
        add_fields(fields, [(part.name, part.data.decode("utf-8", "replace"))])
    for name, part in given.items():
        if not part.data:
            raise EmptyImage() if inputs[name].kind == "image" else MalformedRequest(f"The field `{name}` is empty.")
        if len(part.data) > max_image_bytes:
            raise too_many_bytes(max_image_bytes)
    return Upload(
        inputs={name: part.data for name, part in given.items()},
        name=clean_name(given[first].filename),
        fields=fields,
        is_plain_field=is_image and given[first].filename is None,
    )


def too_many_bytes(max_image_bytes: int) -> TooManyBytes:
    """Build the error for an image over the limit."""
    return TooManyBytes(
        f"The image file is too large. At most {max_image_bytes / 2**20:g} MB ({max_image_bytes} bytes) are accepted: "
        "a smaller size or a stronger JPEG compression helps."
    )


def read_pieces(request: Request, max_bytes: int, too_large: MlgError, active_reads: ActiveReads) -> Iterator[bytes]:
    """Read a body piece by piece.

    :raises MlgError: `too_large`, if it has more than `max_bytes`. :raises MalformedRequest: it ends too early.
    :raises TooManyUploads:
    """
    declared = request.content_length
    if declared is not None and declared > max_bytes:
        raise too_large
    if declared is None and not request.environ.get("wsgi.input_terminated"):
        return  # neither a length nor chunks: there is no body
    stream, size = request.environ["wsgi.input"], 0
    with active_reads.track():
        while piece := stream.read(PIECE_BYTES if declared is None else min(PIECE_BYTES, declared - size)):
            size += len(piece)
            if size > max_bytes:
                raise too_large
            yield piece
    if declared is not None and size < declared:
        raise _cut_short(size, declared)


def _cut_short(size: int, declared: int) -> MalformedRequest:
    return MalformedRequest(f"The connection ended after {size} of {declared} bytes. Send the request again.")


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
            hold_bytes(declared, TooManyUploads())
            body: bytes = stream.read(declared)
            if len(body) < declared:
                raise _cut_short(len(body), declared)
            return body
        pieces: list[bytes] = []
        size = 0
        while piece := stream.read(_BUFFER_BYTES):
            size += len(piece)
            if size > limit:
                raise too_many_bytes(max_image_bytes)
            hold_bytes(len(piece), TooManyUploads())
            pieces.append(piece)
    return b"".join(pieces)
