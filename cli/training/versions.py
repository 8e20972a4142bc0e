"""The versions of models that were trained: `mlg models versions` and `mlg models use`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from cli.open_store import open_store
from cli.options import environment, home_option, json_option
from cli.tables import local_time, make_table, print_json_lines, print_table
from cli.training.shown import headline
from provider_image.errors import NotInstalled
from store.settings import HomeSettings


@click.command("versions")
@home_option
@json_option
@click.argument("name", metavar="MODEL")
def list_versions(as_json: bool, name: str) -> None:
    """List the versions of a model that was trained, newest first, with their figures.

    \b
    Example:
      mlg models versions my_pets
    """
    found = all_versions(HomeSettings.from_env(environment()), name)
    if not found:
        raise NotInstalled(f"No model {name} was trained in this home. Train one: mlg train {name} FOLDER")
    if as_json:
        print_json_lines(one for versions in found.values() for one in versions)
    else:
        print_versions([one for versions in found.values() for one in versions])


@click.command("use")
@home_option
@click.argument("version", metavar="MODEL@VERSION")
def use_version(version: str) -> None:
    """Go back to a version of a model that was trained. The one that is installed now is kept.

    Server and batcher use it from the next request on.

    \b
    Example:
      mlg models use my_pets@1
    """
    settings = HomeSettings.from_env(environment())
    from provider_image.compiler import versions

    name, _, number = version.partition("@")
    with open_store() as store:
        found = [one for one in store.trainings.versions(name) if str(one.version) == number]
    if not found or found[0].digest is None:
        raise versions.UnknownVersion(f"There is no version {version}. List them: mlg models versions {name}")
    versions.use_version(settings.models, found[0].name, found[0].digest)
    click.echo(f"{found[0].name} is version {number} now (digest {found[0].digest[:12]})")


def all_versions(settings: HomeSettings, name: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """List the versions of the models that were trained in a home, or of one: name -> newest first."""
    if not settings.database.exists():
        return {}
    from provider_image.compiler.versions import list_versions as list_kept
    from provider_image.models.artefact import installed_digest
    from store.rows import to_text

    with open_store() as store:
        names = store.trainings.names() if name is None else [name]
        found = [one for each in names for one in store.trainings.versions(each)]
    versions: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        assert one.ended_at is not None  # it is done
        is_used = one.digest == installed_digest(settings.models, one.name)
        version = {
            "name": one.name,
            "version": one.version,
            "digest": one.digest,
            "trained_at": to_text(one.ended_at),
            "examples": one.examples,
            "is_used": is_used,
            "is_kept": is_used or one.digest in list_kept(settings.models, one.name),
            "figures": one.figures,
        }
        versions.setdefault(one.name, []).append(version)
    return versions


def print_versions(versions: list[dict[str, Any]]) -> None:
    """Print versions, one a line."""
    table = make_table("version", "digest", "trained", "used", "figures")
    for one in versions:
        state = "yes" if one["is_used"] else "" if one["is_kept"] else "deleted"
        trained_at = local_time(datetime.fromisoformat(one["trained_at"]))[:16]
        table.add_row(
            f"{one['name']}@{one['version']}", one["digest"][:12], trained_at, state, headline(one["figures"])
        )
    print_table(table)
