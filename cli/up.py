"""The command `mlg up`: the server, the batcher and its workers on this machine, under one supervisor.

Loaded through the table in `mlg.py`. Heavy modules are imported in the function, so that `--help` is fast.
"""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import batcher_options, environment, home_option, host_option, open_option, port_option


@click.command()
@home_option
@host_option
@port_option
@open_option
@batcher_options(default_max_wait="0.2")
def up(
    home: Path | None,
    host: str | None,
    port: int | None,
    is_open: bool,
    executor: str | None,
    workers: int | None,
    max_wait: float | None,
    shrink: str | None,
    precision: str | None,
) -> None:
    """Run the server, the batcher and its workers until Ctrl-C or SIGTERM.

    One process supervises the others and restarts those that crash. Unlike `mlg batch`, it does not wait long for a
    chunk to fill. When it stops, chunks under way are finished or go back to the queue.

    \b
    Example:
      mlg up --home /tmp/try --port 8080
    """
    variables = environment(
        home=home,
        host=host,
        port=port,
        open="1" if is_open else None,
        executor=executor,
        workers=workers,
        max_wait_seconds=max_wait,
        shrink=shrink,
        precision=precision,
    )
    from cli.logs import configure_logging
    from cli.supervisor import Supervisor, with_short_waits

    configure_logging()
    status = Supervisor(with_short_waits(variables), write_line=click.echo).run()
    if status:
        raise click.exceptions.Exit(status)
