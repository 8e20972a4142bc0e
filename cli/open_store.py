"""Opens the store of an existing home, for the commands that use the store directly and not a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cli.options import environment
from provider_image.errors import ConfigError
from server.settings import ServerSettings

if TYPE_CHECKING:
    from store.store import Store


class open_store:
    """Open the store of a home and migrate it; a context manager.

    :raises ConfigError: a setting is invalid, or the home has no database; none is created.
    """

    def __init__(self, home: Path | None) -> None:
        self.settings = ServerSettings.from_env(environment(home=home))

    def __enter__(self) -> Store:
        from store.store import Store

        if not self.settings.database.exists():
            raise ConfigError(
                f"There is no database in {self.settings.home}. Give the home of a server (--home or MLG_HOME), "
                "or create one: mlg migrate"
            )
        self._store = Store(self.settings)
        self._store.migrate()
        return self._store

    def __exit__(self, *_: object) -> None:
        self._store.close()
