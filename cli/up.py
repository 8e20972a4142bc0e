"""The command `mlg up`: the server, the batcher and its workers on this machine, under one supervisor."""

from __future__ import annotations

import click

from cli.options import batcher_options, environment, home_option, server_options


@click.command()
@home_option
@server_options
@batcher_options(default_max_wait="0.2")
def up() -> None:
    """Run the server, the batcher and its workers until Ctrl-C or SIGTERM.

    One process supervises the others and restarts those that crash. Unlike `mlg batch`, it does not wait long for a
    chunk to fill. When it stops, chunks under way are finished or go back to the queue.

    \b
    Example:
      mlg up --home /tmp/try --port 8080
    """
    from cli.logs import configure_logging
    from cli.supervisor import Supervisor, with_short_waits

    configure_logging()
    status = Supervisor(with_short_waits(environment()), write_line=click.echo).run()
    if status:
        raise click.exceptions.Exit(status)
