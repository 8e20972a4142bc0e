"""Fixtures of the pages: the server room's store and application, called as a browser would."""

from __future__ import annotations

from tests.server.conftest import answer, client, settings, store

__all__ = ["answer", "client", "settings", "store"]
