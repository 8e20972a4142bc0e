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
from server.api.endpoint import Field

#: Labels of one request at most, and characters of a label's name and value.
MOST_LABELS = 16
LONGEST_LABEL_NAME = 64
LONGEST_LABEL_VALUE = 200
#: Longest time in seconds, a hundred years, that anything is put off or kept.
LONGEST_SECONDS = 3.2e9

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
WISHES = (LABEL, DEADLINE, KEEP_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a client wishes."""

    labels: Mapping[str, str] = field(default_factory=dict)
    deadline_at: datetime | None = None
    keep_seconds: float | None = None


def read_wishes(request: Request, now: datetime) -> tuple[dict[str, str], Wishes]:
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
    wishes = Wishes(
        labels=read_labels(labels),
        deadline_at=_deadline(fields.pop("deadline", None), now),
        keep_seconds=_seconds("keep_seconds", fields.pop("keep_seconds", None)),
    )
    return fields, wishes


def read_labels(texts: Iterable[str]) -> dict[str, str]:
    """Read labels written name:value. :raises InvalidParams:"""
    labels: dict[str, str] = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not 0 < len(name) <= LONGEST_LABEL_NAME or len(value) > LONGEST_LABEL_VALUE:
            raise InvalidParams(
                f"label takes name:value, with at most {LONGEST_LABEL_NAME} and {LONGEST_LABEL_VALUE} characters."
            )
        if any(unicodedata.category(sign)[0] == "C" for sign in text):
            raise InvalidParams("label takes no control characters.")
        if name in labels:
            raise InvalidParams(f"The label {name!r} stands there twice.")
        labels[name] = value
    if len(labels) > MOST_LABELS:
        raise InvalidParams(f"At most {MOST_LABELS} labels are taken.")
    return labels


def read_moment(name: str, text: str) -> datetime:
    """Read a time. One without a zone is UTC. :raises InvalidParams:"""
    try:
        moment = datetime.fromisoformat(text)
        aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return aware.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidParams(f"{name} takes a time like 2026-12-01T08:00:00Z.") from error


def _deadline(text: str | None, now: datetime) -> datetime | None:
    if text is None:
        return None
    try:
        float(text)
    except ValueError:
        moment = read_moment("deadline", text)
        if moment <= now:
            raise InvalidParams("The deadline is in the past.") from None
        return moment
    seconds: Any = _seconds("deadline", text)
    return now + timedelta(seconds=seconds)


def _seconds(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError as error:
        raise InvalidParams(f"{name} takes a number of seconds.") from error
    if not math.isfinite(seconds) or not 0 <= seconds <= LONGEST_SECONDS:
        raise InvalidParams(f"{name} takes a number of seconds from 0 to {LONGEST_SECONDS:g}.")
    return round(seconds, 3)
