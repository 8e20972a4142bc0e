"""The group `mlg operate`: hold work, let it go on, have everything taken now, and see how things stand.

Works on the store itself, so that it is of use while no server runs; batchers look there twice a second. Found through
the table in `mlg.py`.
"""

from __future__ import annotations

import getpass
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.open_store import open_store
from cli.options import home_option, json_option
from cli.tables import make_table, print_table, printable
from provider_image.errors import MlgError

if TYPE_CHECKING:
    from store.controls import Pause
    from store.sqlite import SqliteStore

#: `drain --wait` looks this often.
POLL_SECONDS = 0.25

reason_option = click.option("--reason", metavar="TEXT", help="Why; clients whose requests wait read it.")


@click.group()
def operate() -> None:
    """Hold all batchers of a home, let them go on, have them take everything now, or see how things stand.

    \b
    Example:
      mlg operate pause --reason "new kernel"
      mlg operate resume
    """


@operate.command()
@home_option
@reason_option
def pause(home: Path | None, reason: str | None) -> None:
    """Have nothing new claimed. What is under way is finished; all else waits and says why.

    \b
    Example:
      mlg operate pause --reason "the line is down"
    """
    from store.controls import Mode, pause

    with open_store(home) as store:
        _print_pause(pause(store, Mode.PAUSED, by=_current_user(), now=datetime.now(UTC), reason=reason))


@operate.command()
@home_option
@reason_option
@click.option("--wait", is_flag=True, help="Wait until nothing is under way.")
@click.option(
    "--patience",
    type=click.FloatRange(0, 86400),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait; exit status 1 if something is under way then.",
)
def drain(home: Path | None, reason: str | None, wait: bool, patience: float) -> None:
    """Have nothing new claimed because the batchers are to be stopped. They stay and do nothing; stop them afterwards.

    \b
    Example:
      mlg operate drain --wait && systemctl stop mlg-batcher
    """
    from store.controls import Mode, pause

    deadline = time.monotonic() + patience
    with open_store(home) as store:
        _print_pause(pause(store, Mode.DRAINING, by=_current_user(), now=datetime.now(UTC), reason=reason))
        while (claimed := sum(each.claimed for each in store.backlog())) and wait:
            if time.monotonic() > deadline:
                raise MlgError(f"{claimed} requests are still under way. Wait longer: mlg operate drain --wait")
            time.sleep(POLL_SECONDS)
    click.echo(f"{claimed} requests are under way" if claimed else "nothing is under way")


@operate.command()
@home_option
def resume(home: Path | None) -> None:
    """Let work go on after a pause or a drain.

    \b
    Example:
      mlg operate resume
    """
    from store import controls

    with open_store(home) as store:
        controls.resume(store, by=_current_user(), now=datetime.now(UTC))
    click.echo("work goes on")


@operate.command()
@home_option
def run(home: Path | None) -> None:
    """Have every running batcher take all that waits now, due or not. A pause stays a pause.

    \b
    Example:
      mlg operate run
    """
    from store import controls

    now = datetime.now(UTC)
    with open_store(home) as store:
        controls.run_now(store, by=_current_user(), now=now)
        control_state, batchers = controls.read_control_state(store), _count_live_batchers(store, now)
    click.echo(f"{batchers} {'batcher takes' if batchers == 1 else 'batchers take'} everything that waits")
    if not batchers:
        raise MlgError("No batcher is running. Start one: mlg batch (or mlg batch --once).")
    if control_state.pause is not None:
        raise MlgError(f"{control_state.pause.notice} Let it go on: mlg operate resume")


@operate.command()
@home_option
@json_option
def status(home: Path | None, as_json: bool) -> None:
    """Show what waits and is under way, who works, how quickly, what failed, and what it costs.

    \b
    Example:
      mlg operate status
      mlg operate status --json | jq .queue
    """
    from server.status.dashboard import Dashboard
    from server.status.queue_stats import QueueStats

    with open_store(home) as store:
        found = Dashboard(store, QueueStats(store), lambda: datetime.now(UTC)).status()
    if as_json:
        click.echo(json.dumps(found))
        return
    if found["hold"]:
        click.echo(printable(found["hold"]["notice"]) + "\n")
    queue = make_table("model", "waiting", "oldest", "under way", right=("waiting", "oldest", "under way"))
    for row in found["queue"]:
        oldest = "" if row["oldest_seconds"] is None else f"{row['oldest_seconds']:.0f} s"
        queue.add_row(row["model"], str(row["waiting"]), oldest, str(row["claimed"]))
    print_table(queue)
    hour, latency = found["throughput"]["hour"], found["latency"]["answer"]
    summary = make_table("", "")
    summary.add_row("batchers", f"{len(found['batchers'])}, {found['capacity']} chunks at once")
    summary.add_row(
        "last hour", f"{hour['answered']} answered, {hour['arrived']} came in, {hour['failed']} items failed"
    )
    if latency:
        summary.add_row("answers", f"half within {latency['p50']:g} s, 95 % within {latency['p95']:g} s")
    summary.add_row("GLM", f"{found['money']['today_shown']} today, {found['money']['total_shown']} in all")
    for row in found["failures"]["requests"][:5]:
        summary.add_row("failed", f"{row['count']} {printable(row['code'])}: {printable(row['reason'])}")
    click.echo()
    print_table(summary)


def _count_live_batchers(store: SqliteStore, now: datetime) -> int:
    from server.status.eta import ALIVE_SECONDS

    return len(store.list_batchers(seen_since=now - timedelta(seconds=ALIVE_SECONDS)))


def _print_pause(pause: Pause) -> None:
    click.echo(printable(pause.notice))


def _current_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return "the operator"
