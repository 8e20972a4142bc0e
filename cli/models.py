"""The group `mlg models`: lists, checks and (in `compile.py`) installs models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cli.compile import compile_models, installed_message
from cli.options import environment, home_option, json_option
from cli.tables import make_table, print_json_lines, print_table, width
from cli.training.versions import all_versions, list_versions, print_versions, use_version
from provider_image.precision import PRECISIONS
from store.settings import HomeSettings

#: On a narrower terminal the list has no titles, which hardly differ from the names.
_MIN_WIDTH_WITH_TITLES = 120


@click.group(invoke_without_command=True)
@click.pass_context
@home_option
@json_option
def models(context: click.Context, as_json: bool) -> None:
    """List the models and which of them are installed; install or check models.

    \b
    Example:
      mlg models
      mlg models compile efficientnet_lite0
      mlg models check efficientnet_lite0
      mlg models use my_pets@1
    """
    if context.invoked_subcommand is None:
        context.invoke(list_models, as_json=as_json)


@models.command("list")
@home_option
@json_option
def list_models(as_json: bool) -> None:
    """List all models. Shows whether each is installed, its size, and its speed if it was checked on this machine.

    An embedding, MODEL_embedding, is listed below its model if it is installed or will be on first use; the JSON has
    those of all models of the catalogue. A copy in another precision, such as MODEL_int8, is listed there too, and
    below the table how it was judged.

    \b
    Example:
      mlg models list --json
    """
    settings = HomeSettings.from_env(environment())
    from server.serializers import serialize_models

    rows = serialize_models(settings.models)
    versions = all_versions(settings)
    if as_json:
        print_json_lines({**row, "versions": versions[row["name"]]} if row["name"] in versions else row for row in rows)
        return
    has_titles = width() >= _MIN_WIDTH_WITH_TITLES
    first = ("model", "title") if has_titles else ("model",)
    columns = ("service", "input", "installed", "digest", "MB", "weights", "images/s")
    table = make_table(*first, *columns, right=("MB", "images/s"))
    names_shown = {row["name"] for row in rows}
    for row in _grouped(rows):
        titles = (row["title"],) if has_titles else ()
        base = _base(row)
        name = f"  {row['name'].removeprefix(base)}" if base in names_shown else row["name"]
        table.add_row(name, *titles, row["service"], _input_cell(row), *_installed_cells(row))
    print_table(table)
    copies = [row for row in rows if row["reduced"] is not None]
    if copies:
        click.echo()
    for row in copies:
        choice = ", taken by MLG_PRECISION=fastest" if row["reduced"]["is_quickest"] else ""
        click.echo(f"{row['name']}: {row['reduced']['figures']}{choice}")
    if versions:
        click.echo()
        print_versions([one for found in versions.values() for one in found])
    if any(row["installed"] and row["images_per_second"] is None for row in rows):
        click.echo("To measure images/s on this machine: mlg models check MODEL", err=True)


for command in (compile_models, list_versions, use_version):
    models.add_command(command)


@models.command("labels")
@home_option
@click.option(
    "--as", "copy_as", metavar="NAME", help="Install a copy with the other names as NAME; MODEL stays as it is."
)
@click.option("--title", metavar="TEXT", help="With --as: the copy's name for people. [default: NAME]")
@click.argument("name", metavar="MODEL")
@click.argument("file", required=False, metavar="[FILE]", type=click.Path(path_type=Path))
def label_models(copy_as: str | None, title: str | None, name: str, file: Path | None) -> None:
    """List the classes of an installed model, or give them other names, for example in another language.

    FILE has a name a line in the model's order, or, in any order, an id, a tab and a name. Without FILE the ids and
    names are written in that form. With other names it is another artefact, with another digest: earlier answers are
    not used for it, and rented computers need an image with it. `mlg models compile MODEL --again` brings the first
    names back.

    \b
    Example:
      mlg models labels resnet50 > names.tsv
      mlg models labels resnet50 german.tsv
      mlg models labels resnet50 german.tsv --as resnet50_german
    """
    settings = HomeSettings.from_env(environment())
    from provider_image.models.artefact import read_artefact
    from provider_image.models.registry import find_row

    model = find_row(settings.models, name).name
    if file is None:
        if copy_as is not None:
            raise click.UsageError("--as NAME needs FILE, the names of the copy's classes.")
        for label in read_artefact(settings.models / model).labels:
            click.echo("\t".join(label))
        return
    if title is not None and copy_as is None:
        raise click.UsageError("--title is for the copy that --as NAME makes.")
    from provider_image.compiler.class_names import replace_names

    click.echo(installed_message(replace_names(settings.models, model, file, copy_as=copy_as, title=title)))


@models.command("check")
@home_option
@json_option
@click.option(
    "--threads", type=click.IntRange(1, 1024), metavar="N", help="Images processed in parallel. [default: one per core]"
)
@click.option(
    "--precision",
    type=click.Choice(tuple(PRECISIONS)),
    default="f32",
    show_default=True,
    help="Precision of the inference; results of bf16 and auto may differ slightly from f32.",
)
@click.argument("names", nargs=-1, required=True, metavar="MODEL|FOLDER...")
def check_models(as_json: bool, threads: int | None, precision: str, names: Sequence[str]) -> None:
    """Check that installed models work. Checks their files and their results for the self-test images.

    Also measures speed and memory. The last line for each model is the verdict. The exit status is 0 only if all
    models are ok. A folder may come from somebody else: it is read without a network and with limits on memory and
    time.

    A speed that is measured in f32 on all cores is shown by `mlg models` from then on; run nothing else meanwhile.

    \b
    Example:
      mlg models check efficientnet_lite0
      mlg models check ./models/densenet121 --json
    """
    settings = HomeSettings.from_env(environment())
    from provider_image.check import check_in_process, print_reports
    from provider_image.models.registry import find_folder

    folders = [find_folder(settings.models, name) for name in names]
    reports = (check_in_process(folder, settings.models, threads=threads, precision=precision) for folder in folders)
    if not print_reports(reports, as_json=as_json, write=click.echo):
        raise click.exceptions.Exit(1)


def _grouped(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put embeddings and copies in other precisions below their model; leave out embeddings that are not there."""
    numbers = {row["name"]: number for number, row in enumerate(rows)}
    shown = [row for row in rows if row["base"] is None or row["installed"] or row["builds_on_first_use"]]
    return sorted(shown, key=lambda row: (numbers.get(_base(row), numbers[row["name"]]), _base(row) is not None))


def _base(row: dict[str, Any]) -> Any:
    """Return the name of the model that another one is made from: an embedding, or a copy in another precision."""
    return row["base"] if row["reduced"] is None else row["reduced"]["base"]


def _input_cell(row: dict[str, Any]) -> str:
    if row["input"] == "row":
        return f"{len(row['columns'])} columns"
    kind = "face" if row["takes_faces"] else row["input"]
    if not row["height"]:
        return str(kind)
    if kind == "image":
        return f"{row['height']} x {row['width']}"
    return f"{kind}, {row['height']}" + (f"x{row['width']}" if row["width"] != row["height"] else "")


def _installed_cells(row: dict[str, Any]) -> tuple[str, ...]:
    if not row["installed"]:
        return ("first use" if row["builds_on_first_use"] else "no", "", "", "", "")
    speed = row["images_per_second"]
    size = f"{row['size_bytes'] / 1e6:.1f}"
    return (
        "yes",
        row["digest"][:12],
        size,
        row["storage"] + (", own" if row["source"] == "own" else ""),
        "" if speed is None else f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}",
    )
