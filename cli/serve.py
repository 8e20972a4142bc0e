"""The commands `mlg serve` and `mlg migrate`."""

from __future__ import annotations

import contextlib
import os

import click

from cli.options import environment, home_option, server_options
from server.address import base_url
from server.settings import ServerSettings
from store.settings import HomeSettings


@click.command()
@home_option
@server_options
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--parent-fd", type=int, hidden=True)
def serve(ready_fd: int | None, parent_fd: int | None) -> None:
    """Run the HTTP server until Ctrl-C or SIGTERM.

    To listen for other machines (--host 0.0.0.0) it needs at least one API key: mlg keys create NAME.

    \b
    Example:
      mlg serve --port 5000
      curl -F image=@kitten.jpg http://127.0.0.1:5000/requestPrediction/efficientnet_lite0
    """
    settings = ServerSettings.from_env(environment())
    from cli.logs import configure_logging
    from server import process

    configure_logging()

    def announce(host: str, port: int) -> None:
        click.echo(f"mlg serves {settings.home} at {base_url(host, port)}", err=True)
        if ready_fd is not None:
            with os.fdopen(ready_fd, "w") as ready:
                ready.write(f"{host} {port}\n")

    private_fds = () if ready_fd is None else (ready_fd,)
    process.serve(settings, on_ready=announce, parent_fd=parent_fd, private_fds=private_fds)


@click.command()
@home_option
def migrate() -> None:
    """Create the home if it does not exist, and update its database to the schema of this version.

    `mlg serve`, `mlg batch` and `mlg up` do this when they start.

    \b
    Example:
      mlg migrate --home /srv/mlg
    """
    settings = HomeSettings.from_env(environment())
    from store.store import Store

    with contextlib.closing(Store(settings)) as store:
        applied = store.migrate()
    click.echo(f"{settings.database}: " + (f"applied {', '.join(applied)}" if applied else "is up to date"))
