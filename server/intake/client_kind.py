"""The kind of program that sends a request, by its header User-Agent.

Used by `server/intake/accept.py` and by views that add requests. What a program says of itself is not checked: it is
counted, and nothing depends on it.
"""

from __future__ import annotations

import functools
import re

import flask

from store.clients.usage import ClientKind

#: The first that matches counts. Telephones call themselves Mozilla too.
_KINDS = (
    (re.compile("telegram", re.IGNORECASE), ClientKind.TELEGRAM),
    (re.compile(r"\bmlg_client\b"), ClientKind.OWN_CLIENT),
    (re.compile(r"^curl/"), ClientKind.CURL),
    (re.compile(r"Mobi|Android|iPhone|iPad|okhttp|CFNetwork"), ClientKind.MOBILE),
    (re.compile(r"^Mozilla/"), ClientKind.BROWSER),
)
#: Only the beginning is looked at: the header is a stranger's.
_MAX_LENGTH = 300


def client_kind(user_agent: str) -> ClientKind:
    """Return the kind of a program that calls itself so."""
    return _kind(user_agent[:_MAX_LENGTH])


@functools.lru_cache(maxsize=256)
def _kind(text: str) -> ClientKind:
    return next((kind for pattern, kind in _KINDS if pattern.search(text)), ClientKind.OTHER)


def current_client_kind() -> ClientKind:
    """Return the kind of the program that sent the current request."""
    return client_kind(flask.request.headers.get("User-Agent", ""))
