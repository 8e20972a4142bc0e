"""The options of a request beside the service's parameters: fresh, webhook, labels, deadline, keep_seconds.

Used by `server/intake/accept.py`, and by the views where they declare their parameters. Labels may be given several
times, all other parameters once. Labels, deadline and keep_seconds are read from the query only.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from flask import Request

from provider_image.errors import InvalidParams
from server.endpoint import Field
from server.http_client import MAX_URL_LENGTH
from server.intake.uploads import query_fields

#: Labels of one request, and characters of a label's name and value.
MAX_LABELS = 16
MAX_LABEL_NAME_LENGTH = 64
MAX_LABEL_VALUE_LENGTH = 200
#: Longest deadline and retention in seconds, a hundred years.
MAX_DURATION_SECONDS = 3.2e9

_TRUE_VALUES, _FALSE_VALUES = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
FRESH = Field(
    name="fresh",
    help="1 computes a new answer even if an equal image was answered by the same model before.",
    schema={"type": "string", "enum": sorted((*_TRUE_VALUES, *_FALSE_VALUES)), "default": "0"},
)
WEBHOOK = Field(
    name="webhook",
    help="An https URL that gets a signed message when the request is done.",
    schema={"type": "string", "format": "uri", "maxLength": MAX_URL_LENGTH},
)
NAME = Field(name="name", help="Your name for the batch; only shown.")
LABEL = Field(
    name="label",
    help="A label of your own, as name:value; may be given several times. GET /requests finds requests by labels.",
    schema={"type": "array", "items": {"type": "string"}},
)
DEADLINE = Field(
    name="deadline",
    help="Seconds from now, or a time like 2026-12-01T08:00:00Z. A request that is still queued then expires.",
)
KEEP_SECONDS = Field(
    name="keep_seconds",
    help="Image and answer are deleted this long after the end, if the operator does not delete them sooner.",
    schema={"type": "number", "minimum": 0},
)
#: Those that are read from the query only.
REQUEST_OPTIONS = (LABEL, DEADLINE, KEEP_SECONDS)


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Labels, deadline and retention that a client requests."""

    labels: Mapping[str, str] = field(default_factory=dict)
    deadline_at: datetime | None = None
    keep_seconds: float | None = None


def read_request_options(request: Request, now: datetime) -> tuple[dict[str, str], RequestOptions]:
    """Read the query. :return: the other parameters, and the options.

    :raises InvalidParams: :raises MalformedRequest: a parameter other than `label` is given twice.
    """
    fields = query_fields(request, repeatable="label")
    options = RequestOptions(
        labels=parse_labels(request.args.getlist("label")) if request.query_string else {},
        deadline_at=_parse_deadline(fields.pop("deadline", None), now),
        keep_seconds=_parse_seconds("keep_seconds", fields.pop("keep_seconds", None)),
    )
    return fields, options


def parse_flag(name: str, text: str) -> bool:
    """Read a parameter that is on or off; alone, as in `?fresh`, it is on. :raises InvalidParams:"""
    word = text.strip().lower()
    if word not in (*_TRUE_VALUES, *_FALSE_VALUES, ""):
        raise InvalidParams(f"{name} takes 1 or 0.")
    return word not in _FALSE_VALUES


def parse_labels(texts: Iterable[str]) -> dict[str, str]:
    """Read labels written name:value. :raises InvalidParams:"""
    labels: dict[str, str] = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not 0 < len(name) <= MAX_LABEL_NAME_LENGTH or len(value) > MAX_LABEL_VALUE_LENGTH:
            raise InvalidParams(
                f"label takes name:value, with at most {MAX_LABEL_NAME_LENGTH} and {MAX_LABEL_VALUE_LENGTH} characters."
            )
        if any(unicodedata.category(character)[0] == "C" for character in text):
            raise InvalidParams("label takes no control characters.")
        if name in labels:
            raise InvalidParams(f"The label {name!r} is given twice.")
        labels[name] = value
    if len(labels) > MAX_LABELS:
        raise InvalidParams(f"A request takes at most {MAX_LABELS} labels.")
    return labels


def parse_timestamp(name: str, text: str) -> datetime:
    """Read a time. One without a zone is UTC. :raises InvalidParams:"""
    try:
        timestamp = datetime.fromisoformat(text)
        aware = timestamp if timestamp.tzinfo is not None else timestamp.replace(tzinfo=UTC)
        return aware.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidParams(f"{name} takes a time like 2026-12-01T08:00:00Z.") from error


def _parse_deadline(text: str | None, now: datetime) -> datetime | None:
    if text is None:
        return None
    try:
        float(text)
    except ValueError:
        timestamp = parse_timestamp("deadline", text)
        if timestamp <= now:
            raise InvalidParams("The deadline is in the past.") from None
        return timestamp
    return now + timedelta(seconds=_parse_seconds("deadline", text) or 0.0)


def _parse_seconds(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError as error:
        raise InvalidParams(f"{name} takes a number of seconds.") from error
    if not math.isfinite(seconds) or not 0 <= seconds <= MAX_DURATION_SECONDS:
        raise InvalidParams(f"{name} takes a number of seconds from 0 to {MAX_DURATION_SECONDS:g}.")
    return round(seconds, 3)
