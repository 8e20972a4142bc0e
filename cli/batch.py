"""The command `mlg batch`: the batcher, on a timer or once."""

from __future__ import annotations

import json

import click

from cli.open_store import open_store
from cli.options import batcher_options, environment, home_option, json_option, setting_option
from store.settings import HomeSettings


@click.command()
@click.option(
    "--once", is_flag=True, help="Process everything that is queued, then exit; exit status 1 if anything failed."
)
@setting_option(
    "--every",
    "MLG_EVERY_SECONDS",
    type=float,
    metavar="SECONDS",
    help="Interval at which everything that is queued is processed. [MLG_EVERY_SECONDS; 600]",
)
@batcher_options(default_max_wait="600")
@home_option
@json_option
@click.option("--parent-fd", type=int, hidden=True)
def batch(once: bool, as_json: bool, parent_fd: int | None) -> None:
    """Run the batcher: group queued requests into chunks and process them, on a timer or once.

    A full chunk is processed at once, a request that has waited --max-wait seconds as well, and everything every
    --every seconds. Several batchers may share one home.

    A chunk holds requests of any client for one model. A batch in the HTTP API (/batches) is something else: the group
    of images that a client sent together.

    \b
    Example:
      mlg batch --every 60
      */10 * * * *  mlg batch --once --home /srv/mlg     (a line for cron)
    """
    variables = environment()
    from batcher.settings import BatcherSettings

    home_settings = HomeSettings.from_env(variables)
    settings = BatcherSettings.from_env(variables)
    from cli.logs import configure_logging

    configure_logging()
    import asyncio
    import secrets

    from batcher.scheduler import run_batcher

    with open_store(creates=True) as store:
        report = asyncio.run(
            run_batcher(
                settings,
                home_settings,
                store,
                variables,
                batcher_id=secrets.token_hex(16),
                is_once=once,
                parent_fd=parent_fd,
            )
        )
    if report is None:
        return
    tally = report.tally
    if as_json:
        left = [{"model": model, "count": count, "reason": why} for model, (count, why) in report.left.items()]
        counts = {name: getattr(tally, name) for name in ("done", "failed", "released", "chunks", "seconds")}
        click.echo(json.dumps({**counts, "left": left}))
    else:
        click.echo(f"{tally.done} answered, {tally.failed} failed, in {tally.chunks} chunks and {tally.seconds:.1f} s")
    for model, (count, why) in report.left.items():
        click.echo(f"mlg: {count} requests for {model} are still queued: {why}", err=True)
    if tally.failed:
        click.echo("mlg: some requests failed; see: mlg requests list --status failed", err=True)
    if not report.is_clean:
        raise click.exceptions.Exit(1)
