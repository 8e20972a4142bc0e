"""The commands of the batcher room: batch, up.

Found through the table in `mlg.py`. Settings are read here, once; whatever is heavy is imported in the function that
needs it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from batcher.settings import SHRINK_CHOICES
from cli.options import environment, home_option, host_option, json_option, open_option, port_option
from provider_image.precision import PRECISIONS
from store.settings import HomeSettings

max_wait_option = click.option(
    "--max-wait", type=float, metavar="SECONDS", help="Longest wait for a full chunk. [MLG_MAX_WAIT_SECONDS; 600]"
)
executor_option = click.option(
    "--executor", metavar="NAMES", help="Where chunks run: local, golem, or golem,local. [MLG_EXECUTOR; local]"
)
workers_option = click.option(
    "--workers", type=int, metavar="N", help="Local worker processes. [MLG_WORKERS; one per core]"
)
shrink_option = click.option(
    "--shrink",
    type=click.Choice(SHRINK_CHOICES),
    help="Send pictures reduced to the model's input: auto does so where chunks leave this machine. [MLG_SHRINK; auto]",
)
precision_option = click.option(
    "--precision",
    type=click.Choice(tuple(PRECISIONS)),
    help="What local workers compute in: bf16 is about twice as fast where the processor has it. [MLG_PRECISION; f32]",
)


@click.command()
@click.option("--once", is_flag=True, help="Take all that waits, then end; exit status 1 if anything failed.")
@click.option("--every", type=float, metavar="SECONDS", help="Take all that waits this often. [MLG_EVERY_SECONDS; 600]")
@max_wait_option
@executor_option
@workers_option
@shrink_option
@precision_option
@home_option
@json_option
@click.option("--parent-fd", type=int, hidden=True)
def batch(
    once: bool,
    every: float | None,
    max_wait: float | None,
    executor: str | None,
    workers: int | None,
    shrink: str | None,
    precision: str | None,
    home: Path | None,
    as_json: bool,
    parent_fd: int | None,
) -> None:
    """Gather waiting requests into chunks and have them answered, on a timer or once.

    A full chunk is taken at once, a request that waited --max-wait seconds too, and everything every --every seconds.
    Several batchers may work on one home.

    \b
    Example:
      mlg batch --every 60
      */10 * * * *  mlg batch --once --home /srv/mlg     (a line for cron)
    """
    variables = environment(
        home=home,
        every_seconds=every,
        max_wait_seconds=max_wait,
        executor=executor,
        workers=workers,
        shrink=shrink,
        precision=precision,
    )
    from batcher.settings import BatcherSettings

    home_settings = HomeSettings.from_env(variables)
    settings = BatcherSettings.from_env(variables)
    from cli.logs import configure_logging

    configure_logging()
    import asyncio
    import secrets

    from batcher.executors import Executor, load_executor
    from batcher.scheduler import run_batcher
    from store.sqlite import SqliteStore

    def make_executor(own_settings: BatcherSettings) -> Executor:
        return load_executor(own_settings.executor, own_settings, store)

    store = SqliteStore(home_settings)
    try:
        store.migrate()
        report = asyncio.run(
            run_batcher(
                settings,
                home_settings,
                store,
                make_executor,
                batcher_id=secrets.token_hex(16),
                is_once=once,
                parent_fd=parent_fd,
            )
        )
    finally:
        store.close()
    if report is None:
        return
    if as_json:
        left = [{"model": model, "count": count, "reason": why} for model, (count, why) in report.left.items()]
        click.echo(json.dumps({**asdict(report), "left": left}))
    else:
        click.echo(
            f"{report.done} answered, {report.failed} failed, in {report.chunks} chunks and {report.seconds:.1f} s"
        )
    for model, (count, why) in report.left.items():
        click.echo(f"mlg: {count} requests for {model} still wait: {why}", err=True)
    if report.failed:
        click.echo("mlg: some requests failed; see: mlg requests list --status failed", err=True)
    if not report.is_clean:
        raise click.exceptions.Exit(1)


@click.command()
@home_option
@host_option
@port_option
@open_option
@executor_option
@workers_option
@max_wait_option
@shrink_option
@precision_option
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
    """Run everything here: the server, the batcher and its workers, looked after by one process.

    Requests wait for each other 0.2 seconds at most, unless --max-wait or MLG_MAX_WAIT_SECONDS says otherwise. What
    dies is started again. Ctrl-C stops it: chunks under way are finished or go back to the queue.

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
