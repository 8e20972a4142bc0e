"""The group `mlg image`: build the provider's image, and publish it for Golem.

Found through the table in `mlg.py`. Settings are read here, once; the work is done in `images.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from cli.options import environment, home_option

tag_option = click.option(
    "--tag", metavar="NAME", help="Name of the image on this machine. [mlg-provider:MODEL, or the models' names with -]"
)


@click.group()
def image() -> None:
    """Build the image that a provider runs, and publish it.

    \b
    Example:
      mlg image build efficientnet_lite0
      MLG_IMAGE_REGISTRY=me/mlg mlg image push efficientnet_lite0
    """


@image.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with the weights files of Keras models, all of which are given to the engine. [downloads them]",
)
@click.option(
    "--installed", is_flag=True, help="Take every model as it is installed in the home instead of compiling it anew."
)
@click.option("--base", metavar="IMAGE", help="Image to build on, with Python 3.11 or newer. [python:3.11-slim]")
@tag_option
@home_option
def build(
    models: Sequence[str], weights: Path | None, installed: bool, base: str | None, tag: str | None, home: Path | None
) -> None:
    """Build one image that holds the models named, with docker, podman or buildah.

    Needs a source checkout. Models of the catalogue are compiled in the build; your own are taken from the home, where
    they must be installed. The engine's output goes to standard error; the last lines name the image and the digest of
    each model in it.

    \b
    Example:
      mlg image build efficientnet_lite0
      mlg image build nasnet_mobile --weights ~/weights
      mlg image build densenet121 my_pets --installed
    """
    from batcher.image_build.builder import ImageSettings, build_image

    settings = ImageSettings.from_env(environment(home=home))
    name, digests = build_image(models, settings, weights=weights, installed=installed, base=base, tag=tag)
    for model, digest in digests.items():
        click.echo(f"{name} holds {model} (digest {digest[:12]})")


@image.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@tag_option
@home_option
def push(models: Sequence[str], tag: str | None, home: Path | None) -> None:
    """Publish the image that was built for the models named on Golem's registry.

    Needs gvmkit-build and a login there (gvmkit-build --login), and MLG_IMAGE_REGISTRY=user/repository. What was
    published is written into provider_image/images.lock.

    \b
    Example:
      MLG_IMAGE_REGISTRY=me/mlg mlg image push efficientnet_lite0
    """
    from batcher.image_build.builder import ImageSettings, push_image

    settings = ImageSettings.from_env(environment(home=home))
    for model, published in push_image(models, settings, tag=tag).items():
        click.echo(f"{model} is published as {published.image}, {published.size_bytes / 1e6:.1f} MB ({published.hash})")
