"""The group `mlg models`: what there is, what is installed here and how well it works, and installing one.

Found through the table in `mlg.py`. Settings are read here, once; whatever is heavy is imported in the function that
needs it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cli.compile import compile_models
from cli.options import environment, home_option, json_option
from cli.tables import make_table, print_table, width
from provider_image.precision import PRECISIONS
from store.settings import HomeSettings

#: With less room than this the titles, which hardly differ from the names, are left out of the list.
_ALL_COLUMNS = 120


@click.group(invoke_without_command=True)
@click.pass_context
@home_option
@json_option
def models(context: click.Context, home: Path | None, as_json: bool) -> None:
    """List the models and which of them are installed; install or check one.

    \b
    Example:
      mlg models
      mlg models compile efficientnet_lite0
      mlg models check efficientnet_lite0
    """
    context.obj = home
    if context.invoked_subcommand is None:
        _list_models(home, as_json)


@models.command("list")
@home_option
@json_option
@click.pass_obj
def list_models(group_home: Path | None, home: Path | None, as_json: bool) -> None:
    """List the models: which are installed, how large they are, and how quick each was when it was checked here.

    \b
    Example:
      mlg models list --json
    """
    _list_models(home or group_home, as_json)


models.add_command(compile_models)


@models.command("check")
@home_option
@json_option
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Pictures side by side. [as many as cores]")
@click.option(
    "--precision",
    type=click.Choice(tuple(PRECISIONS)),
    default="f32",
    show_default=True,
    help="Of the inference; bf16 and auto may answer a little otherwise.",
)
@click.argument("names", nargs=-1, required=True, metavar="MODEL|FOLDER...")
@click.pass_obj
def check_models(
    group_home: Path | None, home: Path | None, as_json: bool, threads: int | None, precision: str, names: Sequence[str]
) -> None:
    """Check installed models: files, answers to the self-test pictures, images a second, memory.

    The last line for each is the verdict. The exit status is 0 only if all of them are ok. `mlg models`
    then shows the speed, if it was measured in f32 on all cores; let nothing else run meanwhile.

    \b
    Example:
      mlg models check efficientnet_lite0
      mlg models check ./models/densenet121 --json
    """
    settings = HomeSettings.from_env(environment(home=home or group_home))
    from provider_image.check import check_in_process
    from provider_image.check_report import describe
    from provider_image.models.registry import find_folder

    folders = [find_folder(settings.models, name) for name in names]
    is_ok = True
    for number, folder in enumerate(folders):
        report = check_in_process(folder, settings.models, threads=threads, precision=precision)
        if as_json:
            click.echo(json.dumps(report.to_json()))
        else:
            click.echo("\n".join([*[""] * bool(number), *describe(report)]))
        is_ok = is_ok and report.is_ok
    if not is_ok:
        raise click.exceptions.Exit(1)


def _list_models(home: Path | None, as_json: bool) -> None:
    settings = HomeSettings.from_env(environment(home=home))
    from server.api.serializers import serialize_models

    rows = serialize_models(settings.models)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    has_titles = width() >= _ALL_COLUMNS
    names = ("model", "title") if has_titles else ("model",)
    table = make_table(*names, "service", "input", "installed", "digest", "MB", "weights", "images/s")
    for column in ("MB", "images/s"):
        next(each for each in table.columns if each.header == column).justify = "right"
    for row in rows:
        titles = (row["title"],) if has_titles else ()
        table.add_row(row["name"], *titles, row["service"], f"{row['height']} x {row['width']}", *_installed(row))
    print_table(table)
    if any(row["installed"] and row["images_per_second"] is None for row in rows):
        click.echo("images/s are measured on this machine by: mlg models check MODEL", err=True)


def _installed(row: dict[str, Any]) -> tuple[str, ...]:
    if not row["installed"]:
        return ("on first use" if row["builds_on_first_use"] else "no", "", "", "", "")
    speed = row["images_per_second"]
    size = f"{row['size_bytes'] / 1e6:.1f}"
    return (
        "yes",
        row["digest"][:12],
        size,
        row["storage"] + (", own" if row["source"] == "own" else ""),
        "" if speed is None else f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}",
    )
