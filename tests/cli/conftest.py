"""Fixtures of the command line: a server that commands talk to."""

from __future__ import annotations

from tests.server.conftest import serve

__all__ = ["serve"]
