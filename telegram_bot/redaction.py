"""Keeps secrets out of the log.

The Bot API has the token in its addresses, and httpx logs addresses; the library for it quotes the token in errors. So
secrets are removed from every record of every logger when it is made, before any handler sees it.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import quote

_HIDDEN = "[hidden]"
#: A shorter text might be a part of other words.
_MIN_LENGTH = 6


class Redaction:
    """Removes some texts from others."""

    def __init__(self, secrets: Iterable[str]) -> None:
        parts: set[str] = set()
        for secret in secrets:
            # The half of a token after the colon is enough to use it.
            for part in (secret, secret.partition(":")[2]):
                parts |= {part, quote(part, safe="")}
        kept = sorted((part for part in parts if len(part) >= _MIN_LENGTH), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, kept))) if kept else None

    def apply(self, text: str) -> str:
        """Return a text without the secrets."""
        return text if self._pattern is None else self._pattern.sub(_HIDDEN, text)

    def is_clean(self, value: Any) -> bool:
        """Tell whether a value, as it would be logged, has none of the secrets."""
        return self._pattern is None or not self._pattern.search(str(value))


class _HiddenError(Exception):
    """Stands in a record for an error whose text had a secret."""


def install(secrets: Iterable[str]) -> Callable[[], None]:
    """Remove secrets from all log records of this process from now on. :return: undoes it."""
    redaction = Redaction(secrets)
    make_record = logging.getLogRecordFactory()

    def make_clean_record(*arguments: Any, **more: Any) -> logging.LogRecord:
        record = make_record(*arguments, **more)
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # arguments that do not fit, which a handler would print
            message = f"{record.msg} {record.args}"
        # Also without a secret: a handler may format later, when an argument has changed.
        record.msg, record.args = redaction.apply(message), None
        if record.exc_info and record.exc_info[1] is not None:
            text = "".join(traceback.format_exception(*record.exc_info))
            if not redaction.is_clean(text):
                hidden = _HiddenError(redaction.apply(text))
                record.exc_info, record.exc_text = (_HiddenError, hidden, None), None
        return record

    logging.setLogRecordFactory(make_clean_record)
    return lambda: logging.setLogRecordFactory(make_record)
