"""The command `mlg load`: sends images to a server of one's own at a chosen rate, and reports how it answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import file_option, json_option
from cli.tables import make_table, print_json_lines, print_table, printable
from provider_image.errors import ConfigError, MlgError
from store.errors import StoreUnavailable

if TYPE_CHECKING:
    from cli.load.figures import Interval, LoadFigures
    from cli.load.plan import LoadPlan
    from cli.load.runner import LoadSample

#: Rows of the table of the time.
_TIME_ROWS = 12


@click.command()
@click.argument("url", required=False, metavar="[URL]")
@click.option(
    "--images",
    required=True,
    type=click.Path(path_type=Path, exists=True),
    metavar="PATH",
    help="An image, or a folder of images; they are sent in turn.",
)
@click.option("--model", default="efficientnet_lite0", show_default=True, metavar="MODEL", help="The model to ask.")
@click.option("--rate", type=float, default=20.0, show_default=True, metavar="N", help="Requests a second.")
@click.option(
    "--ramp",
    type=float,
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="The first part of the time, in which the rate grows evenly from 0.",
)
@click.option("--seconds", type=float, default=60.0, show_default=True, metavar="N", help="How long to send, in all.")
@click.option("--wait", is_flag=True, help="Measure until a request is answered, not only until it is accepted.")
@click.option("--reuse", is_flag=True, help="Let the server reuse earlier answers to equal images.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1, max=600),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="After this time a request counts as failed.",
)
@click.option(
    "--max-in-flight",
    type=click.IntRange(1, 10_000),
    default=1000,
    show_default=True,
    metavar="N",
    help="Requests in progress; one that would be more is not sent and counts as failed.",
)
@click.option("--max-p99", type=float, metavar="MS", help="Exit status 1 if the 99th percentile is over this.")
@click.option("--max-errors", type=float, metavar="PERCENT", help="Exit status 1 if more requests than this fail.")
@file_option("--html", "Write a report with plots.", dir_okay=False)
@file_option("--jmx", "Write the same plan for JMeter, and beside it FILE.csv with the images.", dir_okay=False)
@click.option("--plan-only", is_flag=True, help="Write the --jmx and send nothing.")
@click.option("--allow-host", metavar="HOST", help="Send to this host, which is not this machine but yours.")
@json_option
def load(url: str | None, images: Path, as_json: bool, **options: Any) -> None:
    """Send images to a server of your own at a rate that does not depend on its answers, and report latencies.

    URL is the server's address; MLG_URL or http://127.0.0.1:5000 if it is not given. MLG_API_KEY is sent if it is set.
    Only this machine is accepted, unless --allow-host names the host.

    A latency counts from the time at which a request was to be sent, also where the sender was late. What is sent
    becomes requests like any others: it uses quotas, fills the queue, and is kept as long as the server keeps requests.

    \b
    Example:
      mlg load --rate 20 --ramp 10 --seconds 60 --images photos/ http://127.0.0.1:5000
      mlg load --images kitten.jpg --rate 100 --html report.html --jmx plan.jmx
      mlg load --images photos/ --rate 5 --wait --max-p99 2000 --max-errors 1
    """
    from cli.load.figures import divide, evaluate
    from cli.load.html_report import html_report
    from cli.load.plan import LoadPlan, check_host, read_images
    from mlg_client import DEFAULT_URL

    address = (url or os.environ.get("MLG_URL") or DEFAULT_URL).rstrip("/")
    check_host(address, options["allow_host"])
    plan = LoadPlan(
        url=address,
        model=options["model"],
        rate=options["rate"],
        ramp_seconds=options["ramp"],
        seconds=options["seconds"],
        images=read_images(images),
        waits=options["wait"],
        is_fresh=not options["reuse"],
        timeout_seconds=options["timeout"],
        max_in_flight=options["max_in_flight"],
    )
    plan.check()
    for file in (options["html"], options["jmx"]):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{file} cannot be written: its folder does not exist.")
    key = os.environ.get("MLG_API_KEY")
    if options["jmx"] is not None:
        _write_jmx(plan, options["jmx"], needs_key=bool(key))
    if options["plan_only"]:
        return
    at = datetime.now(UTC)
    samples, is_interrupted = asyncio.run(_run(plan, key))
    figures = evaluate(plan, samples)
    missed = _missed(figures, options["max_p99"], options["max_errors"])
    if as_json:
        print_json_lines([_to_json(plan, figures)])
    else:
        _print(plan, figures, divide(samples, plan.seconds, _TIME_ROWS))
    if options["html"] is not None:
        _write(options["html"], html_report(plan, figures, at=at, missed=missed))
    for text in missed:
        click.echo(f"mlg: {text}", err=True)
    if is_interrupted:
        raise click.exceptions.Exit(130)
    if missed:
        raise click.exceptions.Exit(1)


async def _run(plan: LoadPlan, key: str | None) -> tuple[list[LoadSample], bool]:
    """Send everything. :return: the samples, and whether Ctrl-C ended it early. :raises MlgError: no such server."""
    import httpx

    from cli.load.runner import run_plan

    headers = {"User-Agent": "mlg_client (load)", **({"Authorization": f"Bearer {key}"} if key else {})}
    limits = httpx.Limits(max_connections=plan.max_in_flight, max_keepalive_connections=plan.max_in_flight)
    timeout = httpx.Timeout(plan.timeout_seconds)
    # Without the environment: a proxy would be measured, and get the load.
    async with httpx.AsyncClient(
        base_url=plan.url, headers=headers, limits=limits, timeout=timeout, trust_env=False
    ) as http:
        await _check_server(http, plan)
        with _progress(plan.count) as on_sample:
            task = asyncio.ensure_future(run_plan(plan, http, on_sample))
            interrupts: list[int] = []

            def interrupt() -> None:
                interrupts.append(1)
                task.cancel()

            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
            try:
                return await task, bool(interrupts)
            finally:
                asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)


async def _check_server(http: Any, plan: LoadPlan) -> None:
    """Check that the server is there and has the model, so that a mistake is not sent a thousand times."""
    import httpx

    try:
        response = await http.get("/models")
        models = response.json()["models"] if response.is_success else None
    except httpx.HTTPError as error:
        raise MlgError(f"{plan.url} does not answer: {error or type(error).__name__}. Start it: mlg up") from error
    except (ValueError, KeyError, TypeError) as error:
        raise MlgError(f"{plan.url} is no server of mlg.") from error
    if models is None:
        reason = _reason(response)
        raise MlgError(f"{plan.url} answers with status {response.status_code}{': ' + reason if reason else '.'}")


def _reason(response: Any) -> str:
    try:
        return printable(str(response.json()["reason"]))
    except (ValueError, KeyError, TypeError):
        return ""


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[LoadSample], object]]:
    """Show a progress bar on stderr, if that is a terminal; a context manager that returns what counts a sample."""
    from rich.console import Console
    from rich.progress import Progress

    is_shown = sys.stderr.isatty()
    with Progress(console=Console(file=sys.stderr), disable=not is_shown, transient=True) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda sample: progress.advance(task)


def _missed(figures: LoadFigures, max_p99_ms: float | None, max_errors: float | None) -> list[str]:
    """List the limits that were not kept."""
    missed = []
    if max_p99_ms is not None and (figures.p99 is None or figures.p99 * 1000 > max_p99_ms):
        found = "no request ended well" if figures.p99 is None else f"it is {figures.p99 * 1000:.1f} ms"
        missed.append(f"The 99th percentile may be {max_p99_ms:g} ms; {found}.")
    if max_errors is not None and figures.failed_percent > max_errors:
        missed.append(f"{max_errors:g} % of the requests may fail; {figures.failed_percent:.2f} % did.")
    return missed


def _print(plan: LoadPlan, figures: LoadFigures, intervals: tuple[Interval, ...]) -> None:
    """Print the figures. :param intervals: the rows of the second table."""
    from cli.load.figures import LATE_SECONDS, PERCENTILES
    from cli.load.html_report import milliseconds

    table = make_table("", "", right=())
    until = "answered" if plan.waits else "accepted"
    rows = {
        "planned": f"{figures.planned} requests",
        "not sent": f"{figures.planned - figures.sent}" if figures.sent < figures.planned else "",
        "failed": f"{figures.failed} ({figures.failed_percent:.2f} %)",
        **{f"  {code}": f"{count}" for code, count in figures.failures.items()},
        until: f"{figures.per_second:.1f} a second",
        **{f"p{percent}": milliseconds(value) for percent, value in zip(PERCENTILES, figures.latencies, strict=True)},
        "slowest": milliseconds(figures.maximum),
        "sent late": f"{milliseconds(figures.late)} (p99)",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    print_table(table)
    click.echo()
    names = ("seconds", "planned", "ended well", "failed", *(f"p{percent}" for percent in PERCENTILES))
    times = make_table(*names, right=names)
    for one in intervals:
        counts = map(str, (one.planned, one.completed, one.failed))
        times.add_row(f"{one.start:g}-{one.start + one.seconds:g}", *counts, *map(milliseconds, one.latencies))
    print_table(times)
    if figures.late > LATE_SECONDS:
        click.echo(
            "mlg: Requests were sent late: this machine is too slow for the rate, so the latencies are its own too.",
            err=True,
        )


def _to_json(plan: LoadPlan, figures: LoadFigures) -> dict[str, Any]:
    from cli.load.figures import PERCENTILES

    return {
        "url": plan.url,
        "model": plan.model,
        "rate": plan.rate,
        "ramp_seconds": plan.ramp_seconds,
        "seconds": plan.seconds,
        "waits": plan.waits,
        "planned": figures.planned,
        "sent": figures.sent,
        "failed": figures.failed,
        "failures": figures.failures,
        "per_second": round(figures.per_second, 3),
        **{f"p{percent}_seconds": value for percent, value in zip(PERCENTILES, figures.latencies, strict=True)},
        "max_seconds": figures.maximum,
        "late_p99_seconds": figures.late,
    }


def _write_jmx(plan: LoadPlan, file: Path, *, needs_key: bool) -> None:
    from cli.load.jmeter import image_list, jmeter_plan

    images = file.with_name(f"{file.name}.csv")
    _write(images, image_list([one.path for one in plan.images]))
    _write(file, jmeter_plan(plan, images, needs_key=needs_key))


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreUnavailable(f"{file} cannot be written: {error.strerror}.") from error
