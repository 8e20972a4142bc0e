"""The group `mlg pipelines`: lists, checks and draws pipelines, which are files; nothing here needs a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from cli.options import environment, home_option, json_option
from cli.tables import print_json_lines, print_records
from provider_image.errors import MlgError
from store.pipelines.definition import InvalidPipeline, Pipeline
from store.pipelines.folder import PipelineFile, PipelineFolder
from store.settings import HomeSettings


@click.group(invoke_without_command=True)
@click.pass_context
@home_option
@json_option
def pipelines(context: click.Context, as_json: bool) -> None:
    """List, check or draw pipelines: models whose inputs are the answers of others.

    A pipeline is a file NAME.toml in the folder `pipelines` of the home, or part of mlg. Send images to it as to a
    model. docs/pipelines.md says how it is written.

    \b
    Example:
      mlg pipelines
      mlg pipelines check ~/.mlg/pipelines/objects.toml
      mlg pipelines picture objects --out objects.svg
    """
    if context.invoked_subcommand is None:
        context.invoke(list_pipelines, as_json=as_json)


@pipelines.command("list")
@home_option
@json_option
def list_pipelines(as_json: bool) -> None:
    """List the pipelines, and why one cannot be used.

    \b
    Example:
      mlg pipelines list --json
    """
    found = _folder().list_files()
    if as_json:
        print_json_lines(
            {
                "name": file.name,
                "title": None if file.pipeline is None else file.pipeline.title,
                "is_built_in": file.is_built_in,
                "steps": [] if file.pipeline is None else [step.name for step in file.pipeline.steps],
                "reason": file.reason,
            }
            for file in found
        )
        return
    columns: dict[str, str | Callable[[PipelineFile], object]] = {
        "name": "name",
        "title": lambda file: "" if file.pipeline is None else file.pipeline.title,
        "from": lambda file: "mlg" if file.is_built_in else "the home",
        "steps": lambda file: str(file.reason) if file.pipeline is None else _describe(file.pipeline),
    }
    print_records(found, columns)


@pipelines.command("check")
@home_option
@click.argument("names", metavar="[NAME|FILE]...", nargs=-1)
def check_pipelines(names: tuple[str, ...]) -> None:
    """Check pipelines by name, or files that are not in the home yet; all pipelines without a name.

    \b
    Example:
      mlg pipelines check
      mlg pipelines check new.toml
    """
    folder = _folder()
    files = [_read(folder, name) for name in names] if names else folder.list_files()
    for file in files:
        click.echo(f"{file.path}: {file.reason or 'correct'}")
    broken = [file.name for file in files if file.pipeline is None]
    if broken:
        raise InvalidPipeline(f"Not usable: {', '.join(broken)}")


@pipelines.command("picture")
@home_option
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Where it is written. [standard output]")
@click.argument("name", metavar="NAME|FILE")
def draw(out: Path | None, name: str) -> None:
    """Draw a pipeline as SVG.

    \b
    Example:
      mlg pipelines picture objects --out objects.svg
    """
    from server.pages.pipeline_picture import draw_pipeline

    file = _read(_folder(), name)
    if file.pipeline is None:
        raise InvalidPipeline(file.reason)
    picture = draw_pipeline(file.pipeline)
    if out is None:
        click.echo(picture)
    else:
        out.write_text(picture)


def _folder() -> PipelineFolder:
    settings = HomeSettings.from_env(environment())
    return PipelineFolder(settings.home, settings.models)


def _read(folder: PipelineFolder, name: str) -> PipelineFile:
    """Read a pipeline by its name, or a file. :raises InvalidPipeline: there is none."""
    if not name.endswith(".toml"):
        found = next((file for file in folder.list_files() if file.name == name), None)
        if found is None:
            raise InvalidPipeline(f"There is no pipeline {name[:64]!r}. mlg pipelines lists those there are.")
        return found
    path = Path(name)
    try:
        return PipelineFile(name=path.stem, path=path, pipeline=folder.read(path))
    except MlgError as error:
        return PipelineFile(name=path.stem, path=path, pipeline=None, reason=error.reason)


def _describe(pipeline: Pipeline) -> str:
    return ", ".join(f"{step.name} ({step.model})" for step in pipeline.steps)
