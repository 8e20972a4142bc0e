"""Answers as text for a chat: bars for probabilities, lines for other values.

Plain text without markup, so that no label of a model can change how a message looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlg_client import Request
from telegram_bot.state import Photo
from telegram_bot.texts import duration, say

#: What Telegram takes, in UTF-16 units: a message, and the text under a file.
MAX_TEXT, MAX_CAPTION = 4096, 1024
#: Labels of one photo, and entries of a list in other answers.
_MAX_LABELS, _MAX_ENTRIES = 5, 10
_BAR_LENGTH = 12


def answer_text(answer: Mapping[str, Any], language: str, title: str) -> str:
    """Write the answer to one photo.

    :param answer: `status`, `preds`, `reason`, `code`, `unknown` as the server reported them.
    :param title: of the model.
    """
    if answer["status"] != "done":
        return _ending(answer, language)
    lines = [title, ""]
    if answer.get("unknown"):
        lines += [say(language, "unknown"), ""]
    return "\n".join([*lines, values_text(answer.get("preds"))])


def progress_text(request: Request | None, language: str, *, done: int, count: int) -> str:
    """Write how far a job is.

    :param request: one that it still waits for, as the server reports it; None if that is not known.
    :param done: photos of its `count` that are answered.
    """
    part: Any = None if request is None else request.raw.get("progress")
    if request is not None and request.status == "claimed":
        is_known = isinstance(part, int | float)
        text = say(language, "working_part", percent=round(100 * part)) if is_known else say(language, "working")
    elif request is not None and request.eta_seconds is not None:
        text = say(language, "queued_for", time=duration(request.eta_seconds))
    else:
        text = say(language, "queued")
    return text if count == 1 else f"{text} {say(language, 'answered_of', done=done, count=count)}"


def album_text(photos: Sequence[Photo], language: str, title: str) -> str:
    """Write the answers to the photos of an album, a line or two for each; those that wait are left out."""
    lines = [title, ""]
    for photo in photos:
        if photo.answer is None:
            continue
        if photo.answer["status"] != "done":
            said = _ending(photo.answer, language)
        else:
            rows = _labels(photo.answer.get("preds"))
            said = f"{_name(rows[0])} {_percent(rows[0][-1])}" if rows else ", ".join(_lines(photo.answer.get("preds")))
        lines.append(f"{photo.position + 1}. {said}")
    return "\n".join(lines)


def values_text(preds: Any) -> str:
    """Write the values of any answer, a line each."""
    return "\n".join(_lines(preds))


def shorten(text: str, limit: int) -> str:
    """Cut a text to what Telegram takes, counted as Telegram counts; half characters become question marks."""
    units = text.encode("utf-16-le", "replace")
    is_short = len(units) <= 2 * limit
    return units.decode("utf-16-le") if is_short else units[: 2 * (limit - 1)].decode("utf-16-le", "ignore") + "…"


def file_of(files: Mapping[str, str]) -> tuple[str, str] | None:
    """Choose the file of an answer that is shown: an image if there is one.

    :param files: name -> media type.
    :return: name and media type.
    """
    ranked = sorted(files.items(), key=lambda one: (one[0] != "image", not one[1].startswith("image/"), one[0]))
    return ranked[0] if ranked else None


def _ending(answer: Mapping[str, Any], language: str) -> str:
    """Write why there is no answer."""
    if answer["status"] == "cancelled":
        return say(language, "cancelled")
    if answer.get("code") == "unknown_request":
        return say(language, "answer_lost")
    name = "refused" if answer["status"] == "refused" else "failed"
    return say(language, name, reason=answer.get("reason") or answer["status"])


def _lines(preds: Any) -> list[str]:
    rows = _labels(preds)
    if rows is not None:
        lines = []
        for row in rows[:_MAX_LABELS]:
            filled = round(min(max(float(row[-1]), 0.0), 1.0) * _BAR_LENGTH)
            lines += [_name(row), f"{'█' * filled}{'░' * (_BAR_LENGTH - filled)} {_percent(row[-1])}"]
        return lines
    if isinstance(preds, Mapping):
        return [line for name, value in preds.items() for line in _entry(str(name).replace("_", " "), value, 0)]
    return [] if preds is None else _entry("", preds, 0)


def _labels(preds: Any) -> list[Any] | None:
    """Return the rows of labels in an answer; None if it is of another kind."""
    rows = preds.get("labels") if isinstance(preds, Mapping) else preds
    is_labels = isinstance(rows, list) and all(
        isinstance(row, list) and len(row) in (2, 3) and isinstance(row[-1], int | float) for row in rows
    )
    return rows if is_labels and rows else None


def _name(row: Sequence[Any]) -> str:
    return str(row[-2]).replace("_", " ")


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.095 else f"{100 * value:.1f} %"


def _entry(name: str, value: Any, depth: int) -> list[str]:
    """Write a value of any answer: nested ones are indented."""
    indent, head = "  " * depth, f"{name}: " if name else ""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return [f"{indent}{head}{value}"]
    if isinstance(value, int | float):
        shown = f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
        return [f"{indent}{head}{shown}"]
    entries = list(value.items()) if isinstance(value, Mapping) else [(f"{i}", one) for i, one in enumerate(value, 1)]
    if depth >= 3:
        return [f"{indent}{head}({len(entries)})"]
    lines = [f"{indent}{name} ({len(entries)})" if not isinstance(value, Mapping) else f"{indent}{name}"]
    for key, one in entries[:_MAX_ENTRIES]:
        lines += _entry(str(key).replace("_", " "), one, depth + 1)
    return lines
