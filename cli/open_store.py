"""Opens the store of an existing home, for the commands that use the store directly and not a server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cli.options import environment
from provider_image.errors import ConfigError
from store.settings import HomeSettings

if TYPE_CHECKING:
    from store.store import Store


@contextlib.contextmanager
def open_store(*, creates: bool = False) -> Iterator[Store]:
    """Open the store of a home and migrate it; a context manager.

    :param creates: create the home if there is none.
    :raises ConfigError: a setting is invalid, or the home has no database.
    """
    settings = HomeSettings.from_env(environment())
    from store.store import Store

    if not creates and not settings.database.exists():
        raise ConfigError(
            f"There is no database in {settings.home}. Give the home of a server (--home or MLG_HOME), "
            "or create one: mlg migrate"
        )
    with contextlib.closing(Store(settings)) as store:
        store.migrate()
        yield store
