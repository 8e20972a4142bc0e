"""Stores of new homes, made quickly: an empty database is migrated once in a process, and copied.

Also homes as earlier versions have made them.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path
from unittest import mock

from store import migrations
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


def make_earlier_home(settings: HomeSettings, step: migrations.Step) -> list[str]:
    """Make a home as the last version before a step of the migrations made it. :return: the steps that it has."""
    earlier = migrations.STEPS[: migrations.STEPS.index(step)]
    with mock.patch.object(migrations, "STEPS", earlier), contextlib.closing(Store(settings)) as store:
        return store.migrate()


@functools.cache
def _empty_database() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        settings = HomeSettings(home=Path(folder))
        with contextlib.closing(Store(settings)) as store:
            store.migrate()
        return settings.database.read_bytes()
