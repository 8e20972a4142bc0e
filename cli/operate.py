"""The group `mlg operate`: pauses, drains, resumes and triggers the batchers of a home, and shows its status.

It uses the store directly; batchers check there for changes twice a second.
"""

from __future__ import annotations

import getpass
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from cli.open_store import open_store
from cli.options import home_option, json_option
from cli.tables import make_table, print_json_lines, print_table, printable
from provider_image.errors import MlgError

if TYPE_CHECKING:
    from store.processes.controls import Pause

#: Interval at which `drain --wait` checks the queue.
POLL_SECONDS = 0.25

reason_option = click.option("--reason", metavar="TEXT", help="Why; shown to clients whose requests wait.")


@click.group()
def operate() -> None:
    """Pause, drain, resume or trigger all batchers of a home, or show its status.

    \b
    Example:
      mlg operate pause --reason "new kernel"
      mlg operate resume
    """


@operate.command()
@home_option
@reason_option
def pause(reason: str | None) -> None:
    """Stop all batchers from starting new work. Chunks under way are finished, all other requests wait.

    \b
    Example:
      mlg operate pause --reason "network maintenance"
    """
    from store.processes.controls import Mode

    with open_store() as store:
        _print_pause(store.controls.pause(Mode.PAUSED, by=_current_user(), now=datetime.now(UTC), reason=reason))


@operate.command()
@home_option
@reason_option
@click.option("--wait", is_flag=True, help="Wait until no request is being processed.")
@click.option(
    "--patience",
    type=click.FloatRange(0, 86400),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="With --wait: how long; exit status 1 if requests are being processed even then.",
)
def drain(reason: str | None, wait: bool, patience: float) -> None:
    """Pause before a shutdown. All batchers stop starting new work.

    Unlike after `pause`, clients read that the service is shutting down. The batchers keep running without work; stop
    them afterwards.

    \b
    Example:
      mlg operate drain --wait && systemctl stop mlg-batcher
    """
    from store.processes.controls import Mode

    deadline = time.monotonic() + patience
    with open_store() as store:
        _print_pause(store.controls.pause(Mode.DRAINING, by=_current_user(), now=datetime.now(UTC), reason=reason))
        while (claimed := sum(each.claimed for each in store.requests.backlog())) and wait:
            if time.monotonic() > deadline:
                raise MlgError(
                    f"{claimed} requests are still being processed. To wait longer: mlg operate drain --wait"
                )
            time.sleep(POLL_SECONDS)
    click.echo(f"{claimed} requests are being processed" if claimed else "no request is being processed")


@operate.command()
@home_option
def resume() -> None:
    """Let the batchers continue after a pause or a drain.

    \b
    Example:
      mlg operate resume
    """

    with open_store() as store:
        store.controls.resume(by=_current_user(), now=datetime.now(UTC))
    click.echo("batchers continue")


@operate.command()
@home_option
def run() -> None:
    """Process all queued requests now. The running batchers do not wait for full chunks.

    This does not end a pause; for that see `mlg operate resume`.

    \b
    Example:
      mlg operate run
    """

    from server.status.eta import ALIVE_SECONDS

    now = datetime.now(UTC)
    with open_store() as store:
        store.controls.run_now(by=_current_user(), now=now)
        pause = store.controls.state().pause
        batchers = len(store.batchers.list(seen_since=now - timedelta(seconds=ALIVE_SECONDS)))
    click.echo(f"{batchers} {'batcher processes' if batchers == 1 else 'batchers process'} all queued requests")
    if not batchers:
        raise MlgError("No batcher is running. Start one: mlg batch (or mlg batch --once).")
    if pause is not None:
        raise MlgError(f"{pause.notice} To continue: mlg operate resume")


@operate.command()
@home_option
@json_option
def status(as_json: bool) -> None:
    """Show the queue, the batchers, latency, failures and cost.

    \b
    Example:
      mlg operate status
      mlg operate status --json | jq .queue
    """
    from server.status.dashboard import Dashboard
    from server.status.queue_stats import QueueStats

    with open_store() as store:
        found = Dashboard(store, QueueStats(store), lambda: datetime.now(UTC)).status()
    if as_json:
        print_json_lines([found])
        return
    if found["hold"]:
        click.echo(printable(found["hold"]["notice"]) + "\n")
    numbers = ("waiting", "oldest", "processing")
    queue = make_table("model", *numbers, right=numbers)
    for row in found["queue"]:
        oldest = "" if row["oldest_seconds"] is None else f"{row['oldest_seconds']:.0f} s"
        queue.add_row(row["model"], str(row["waiting"]), oldest, str(row["claimed"]))
    print_table(queue)
    hour, latency = found["throughput"]["hour"], found["latency"]["answer"]
    summary = make_table("", "")
    summary.add_row("batchers", f"{len(found['batchers'])}, {found['capacity']} chunks at once")
    summary.add_row(
        "last hour", f"{hour['answered']} answered, {hour['arrived']} received, {hour['failed']} items failed"
    )
    if latency:
        summary.add_row("latency", f"50 % within {latency['p50']:g} s, 95 % within {latency['p95']:g} s")
    summary.add_row("GLM", f"{found['money']['today_shown']} today, {found['money']['total_shown']} in total")
    for row in found["failures"]["requests"][:5]:
        summary.add_row("failed", f"{row['count']} {printable(row['code'])}: {printable(row['reason'])}")
    click.echo()
    print_table(summary)


def _print_pause(pause: Pause) -> None:
    click.echo(printable(pause.notice))


def _current_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        return "the operator"
