"""The commands of the server room: serve, migrate, requests, submit; the group `models` is in `model_commands.py`.

Found through the table in `mlg.py`. Settings are read here, once; whatever is heavy is imported in the function that
needs it, so that `mlg requests --help` is quick.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import environment, home_option, host_option, open_option, port_option
from cli.requests import requests
from provider_image.errors import MlgError
from server.address import base_url
from server.settings import ServerSettings
from store.settings import HomeSettings

if TYPE_CHECKING:
    from server.submit import Row

__all__ = ["migrate", "requests", "serve", "submit"]


# serve


@click.command()
@home_option
@host_option
@port_option
@open_option
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--parent-fd", type=int, hidden=True)
def serve(
    home: Path | None, host: str | None, port: int | None, is_open: bool, ready_fd: int | None, parent_fd: int | None
) -> None:
    """Run the HTTP server until Ctrl-C or SIGTERM.

    For other machines (--host 0.0.0.0) it wants API keys: mlg keys create NAME.

    \b
    Example:
      mlg serve --port 5000
      curl -F image=@kitten.jpg http://127.0.0.1:5000/requestPrediction/efficientnet_lite0
    """
    settings = ServerSettings.from_env(environment(home=home, host=host, port=port, open="1" if is_open else None))
    from cli.logs import configure_logging
    from server import process

    configure_logging()

    def announce(host: str, port: int) -> None:
        click.echo(f"mlg serves {settings.home} at {base_url(host, port)}", err=True)
        if ready_fd is not None:
            with os.fdopen(ready_fd, "w") as ready:
                ready.write(f"{host} {port}\n")

    private = () if ready_fd is None else (ready_fd,)
    process.serve(settings, on_ready=announce, parent_fd=parent_fd, private_fds=private)


# migrate


@click.command()
@home_option
def migrate(home: Path | None) -> None:
    """Make the home if need be and bring its database to this version's schema.

    `mlg serve`, `mlg batch` and `mlg up` do this by themselves.

    \b
    Example:
      mlg migrate --home /srv/mlg
    """
    settings = HomeSettings.from_env(environment(home=home))
    from store.sqlite import SqliteStore

    store = SqliteStore(settings)
    try:
        applied = store.migrate()
    finally:
        store.close()
    click.echo(f"{settings.database}: " + (f"applied {', '.join(applied)}" if applied else "is up to date"))


# submit


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE|DIR...")
@click.option("--model", required=True, metavar="MODEL", help="Which model; `mlg models` lists them.")
@click.option("--wait", is_flag=True, help="Wait for the answers and write them.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the answers to this .jsonl or .csv file; waits for them.",
)
@click.option("--url", metavar="URL", help="The server. [http://127.0.0.1:5000, or MLG_HOST and MLG_PORT]")
@click.option("--top", type=click.IntRange(1, 20), default=5, show_default=True, help="Labels a picture.")
@click.option(
    "--patience",
    type=click.FloatRange(0, 86400),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to try again when the server is busy or away.",
)
@home_option
def submit(
    paths: Sequence[Path],
    model: str,
    wait: bool,
    out: Path | None,
    url: str | None,
    top: int,
    patience: float,
    home: Path | None,
) -> None:
    """Send pictures, and whole folders of them, to a server.

    Run it again after a break: what the server has is not sent again. Without --wait each line on stdout is a file and
    its request id, with it also the status and the best label, separated by tabs. The exit status is 1 if any failed.

    \b
    Example:
      mlg submit --model efficientnet_lite0 --wait kitten.jpg
      mlg submit --model efficientnet_lite0 --out results.csv photos/
    """
    settings = ServerSettings.from_env(environment(home=home))
    from server import submit as submission
    from server.client import Client
    from server.progress import Bars
    from server.submissions import Submissions

    if out is not None:
        submission.check_out(out)
    rows = [submission.Row(file=file) for file in submission.find_files(paths)]
    address = (url or base_url(settings.host, settings.port)).rstrip("/")
    is_waiting = wait or out is not None
    client = Client(address, model, connections=submission.IN_FLIGHT, patience_seconds=patience)

    def interrupt(number: int, frame: object) -> None:
        client.stopping.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        with (
            Submissions(settings.home, address, model.lower()) as journal,
            Bars(len(rows), is_waiting=is_waiting, tell=None if is_waiting else _print_sent) as bars,
        ):
            submission.send_all(rows, client, journal, top=top, progress=bars)
            if is_waiting:
                submission.wait_for_all(rows, client, top=top, progress=bars)
    except (MlgError, KeyboardInterrupt) as error:
        client.stopping.set()
        if out is not None:
            submission.write_rows(rows, out)
        acknowledged = sum(row.req_id is not None for row in rows)
        click.echo(
            f"mlg: {acknowledged} of {len(rows)} pictures are with the server. Run the same command again to go on.",
            err=True,
        )
        if isinstance(error, KeyboardInterrupt):
            # At once: threads may be in the middle of a request, and an interpreter that ends around them can hang.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        raise
    if out is not None:
        submission.write_rows(rows, out)
    elif is_waiting:
        for row in rows:
            _print_answered(row)
    failed = [row for row in rows if row.is_failed]
    for row in failed:
        click.echo(f"mlg: {_displayable(row.file)}: {row.reason or row.status}", err=True)
    if failed:
        raise click.exceptions.Exit(1)


def _print_sent(row: Row) -> None:
    if row.req_id is not None:
        _write_line([os.fsencode(row.file), row.req_id.encode()])


def _print_answered(row: Row) -> None:
    preds = (row.answer or {}).get("preds") or [["", "", 0.0]]
    best = f"{preds[0][1]} {preds[0][2]:.3f}" if preds[0][1] else ""
    _write_line([os.fsencode(row.file), (row.req_id or "").encode(), row.status.encode(), best.encode()])


def _write_line(fields: list[bytes]) -> None:
    # As bytes: a file name need not be UTF-8.
    sys.stdout.buffer.write(b"\t".join(fields) + b"\n")
    sys.stdout.buffer.flush()


def _displayable(file: Path) -> str:
    return os.fsencode(file).decode("utf-8", "replace")
