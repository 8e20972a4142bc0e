"""The group `mlg golem`: checks the connection to the Golem network.

The work is done by `batcher/executors/golem/check.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from cli.options import environment, home_option, json_option
from cli.tables import print_json_lines, printable


@click.group()
def golem() -> None:
    """Check the connection to the Golem network.

    \b
    Example:
      mlg golem check
    """


@golem.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--seconds",
    type=click.FloatRange(1, 3600),
    default=30.0,
    show_default=True,
    metavar="S",
    help="How long to wait for offers.",
)
@click.option("--download", is_flag=True, help="Download each image, as providers do, and check its hash.")
@home_option
@json_option
@click.pass_context
def check(context: click.Context, models: Sequence[str], seconds: float, download: bool, as_json: bool) -> None:
    """Check all that the golem executor needs: daemon, app key, gftp, images, account, funds, offers and prices.

    For each it says what was found and, if something is wrong, what to do; the exit status is then 1. Without MODEL it
    checks the images and offers of all installed models. Nothing is rented, and nothing is paid.

    \b
    Example:
      mlg golem check
      mlg golem check nasnet_mobile --seconds 120 --download
    """
    from batcher.executors.golem.check import GolemCheck
    from batcher.executors.golem.settings import GolemSettings
    from batcher.image_build.builder import canonical_names
    from provider_image.errors import NotInstalled
    from provider_image.models.registry import installed_folders
    from store.settings import HomeSettings

    variables, names = environment(), list[str]()
    folder = Path(HomeSettings.from_env(variables).home, "models")
    if models:
        names = canonical_names(folder, models)
    else:
        with contextlib.suppress(NotInstalled):  # the check says so
            names = [each.name for each in installed_folders(folder)]
    checks = GolemCheck(
        GolemSettings.from_env(variables),
        folder,
        names,
        environment=variables,
        seconds=seconds,
        is_downloading=download,
    )
    is_ok = True
    for result in checks.run():
        is_ok = is_ok and result.is_ok
        if as_json:
            print_json_lines([asdict(result)])
            continue
        click.echo(f"{'ok' if result.is_ok else 'FAILED':<8}{result.name}: {printable(result.finding)}")
        if result.remedy:
            click.echo(f"{'':<8}{printable(result.remedy)}")
    context.exit(0 if is_ok else 1)
