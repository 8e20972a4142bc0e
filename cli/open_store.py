"""Opens what a command works on: the store of an existing home, or a client of a running server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cli.options import environment
from provider_image.errors import ConfigError, MlgError
from store.settings import HomeSettings

if TYPE_CHECKING:
    from mlg_client import Client
    from store.store import Store

#: How long a command tries to reach a server before it says that there is none.
_REACH_SECONDS = 3.0


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


@contextlib.contextmanager
def open_client(url: str | None) -> Iterator[Client]:
    """Open a client of a server that is there; a context manager. Once reached, a server may be away for a minute.

    :param url: its address; None for MLG_URL or this machine.
    :raises MlgError: what the server refuses in the block, or that it does not answer.
    """
    from mlg_client import Client, ClientError, Unavailable, Unreachable

    try:
        with contextlib.suppress(Unavailable), Client(url, retry_timeout_seconds=_REACH_SECONDS) as client:
            client.health()
        with Client(url) as client:
            yield client
    except ClientError as error:
        hint = " Start it: mlg up. Or give another address: --url." if isinstance(error, Unreachable) else ""
        raise MlgError(error.reason + hint) from error
