"""Fixtures of the client: the server's store, application and process, which it calls."""

from __future__ import annotations

from tests.server.conftest import answer, client, serve, settings, store

__all__ = ["answer", "client", "serve", "settings", "store"]
