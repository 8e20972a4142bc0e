"""What a client wishes about its requests beside the service's parameters: labels, a deadline, how long they are kept.

Read from the query by the views that take pictures. Labels may stand there several times, all other fields once.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from flask import Request

from provider_image.errors import InvalidParams, MalformedRequest
from server.endpoint import Field

#: Labels of one request at most, and characters of a label's name and value.
MAX_LABELS = 16
MAX_LABEL_NAME_LENGTH = 64
MAX_LABEL_VALUE_LENGTH = 200
#: Longest time in seconds, a hundred years, that anything is put off or kept.
MAX_DURATION_SECONDS = 3.2e9

LABEL = Field(
    name="label",
    help="Your own words about it, as name:value; may stand there several times. GET /requests finds it by them.",
    schema={"type": "array", "items": {"type": "string"}},
)
DEADLINE = Field(
    name="deadline",
    help="Seconds from now, or a time like 2026-12-01T08:00:00Z. What still waits then expires.",
)
KEEP_SECONDS = Field(
    name="keep_seconds",
    help="Picture and answer are deleted this long after the end, if the operator does not delete them sooner.",
    schema={"type": "number", "minimum": 0},
)
#: All of them, for the description of an operation.
REQUEST_OPTIONS = (LABEL, DEADLINE, KEEP_SECONDS)


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What a client wishes."""

    labels: Mapping[str, str] = field(default_factory=dict)
    deadline_at: datetime | None = None
    keep_seconds: float | None = None


def read_request_options(request: Request, now: datetime) -> tuple[dict[str, str], RequestOptions]:
    """Read the query. :return: the fields that are no wishes, and the wishes.

    :raises InvalidParams: :raises MalformedRequest: a field other than `label` stands there twice.
    """
    fields: dict[str, str] = {}
    labels: list[str] = []
    for name, value in request.args.items(multi=True) if request.query_string else ():
        if name == "label":
            labels.append(value)
        elif name in fields:
            raise MalformedRequest(f"{name[:64]!r} stands there twice. Send it once.")
        else:
            fields[name] = value
    options = RequestOptions(
        labels=read_labels(labels),
        deadline_at=_deadline(fields.pop("deadline", None), now),
        keep_seconds=_seconds("keep_seconds", fields.pop("keep_seconds", None)),
    )
    return fields, options


def read_labels(texts: Iterable[str]) -> dict[str, str]:
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
            raise InvalidParams(f"The label {name!r} stands there twice.")
        labels[name] = value
    if len(labels) > MAX_LABELS:
        raise InvalidParams(f"At most {MAX_LABELS} labels are taken.")
    return labels


def parse_timestamp(name: str, text: str) -> datetime:
    """Read a time. One without a zone is UTC. :raises InvalidParams:"""
    try:
        timestamp = datetime.fromisoformat(text)
        aware = timestamp if timestamp.tzinfo is not None else timestamp.replace(tzinfo=UTC)
        return aware.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidParams(f"{name} takes a time like 2026-12-01T08:00:00Z.") from error


def _deadline(text: str | None, now: datetime) -> datetime | None:
    if text is None:
        return None
    try:
        float(text)
    except ValueError:
        timestamp = parse_timestamp("deadline", text)
        if timestamp <= now:
            raise InvalidParams("The deadline is in the past.") from None
        return timestamp
    seconds: Any = _seconds("deadline", text)
    return now + timedelta(seconds=seconds)


def _seconds(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError as error:
        raise InvalidParams(f"{name} takes a number of seconds.") from error
    if not math.isfinite(seconds) or not 0 <= seconds <= MAX_DURATION_SECONDS:
        raise InvalidParams(f"{name} takes a number of seconds from 0 to {MAX_DURATION_SECONDS:g}.")
    return round(seconds, 3)
