"""Stores of new homes, made quickly: an empty database is migrated once in a process, and copied."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path

from store.settings import HomeSettings
from store.store import Store


def open_store(settings: HomeSettings) -> Store:
    """Open the store of a home, which may be new. The caller closes it."""
    store = Store(settings)
    if not settings.database.exists():
        settings.home.mkdir(parents=True, exist_ok=True)
        settings.database.write_bytes(_empty_database())
    store.migrate()
    return store


@functools.cache
def _empty_database() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        settings = HomeSettings(home=Path(folder))
        with contextlib.closing(Store(settings)) as store:
            store.migrate()
        return settings.database.read_bytes()
