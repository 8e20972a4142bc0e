"""The group `mlg image`: build the provider's image, and publish it for Golem.

Found through the table in `mlg.py`. Settings are read here, once; the work is done in `images.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

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
@click.option("--base", metavar="IMAGE", help="Image to build on, with Python 3.11 or newer. [python:3.11-slim]")
@tag_option
def build(models: Sequence[str], weights: Path | None, base: str | None, tag: str | None) -> None:
    """Build one image that holds the models named, with docker, podman or buildah.

    Needs a source checkout. The engine's output goes to standard error; the last lines name the image and the digest
    of each model in it.

    \b
    Example:
      mlg image build efficientnet_lite0
      mlg image build nasnet_mobile --weights ~/weights
    """
    from batcher.images import ImageSettings, build_image

    name, digests = build_image(models, ImageSettings.from_env(os.environ), weights=weights, base=base, tag=tag)
    for model, digest in digests.items():
        click.echo(f"{name} holds {model} (digest {digest[:12]})")


@image.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@tag_option
def push(models: Sequence[str], tag: str | None) -> None:
    """Publish the image that was built for the models named on Golem's registry.

    Needs gvmkit-build and a login there (gvmkit-build --login), and MLG_IMAGE_REGISTRY=user/repository. What was
    published is written into provider_image/images.lock.

    \b
    Example:
      MLG_IMAGE_REGISTRY=me/mlg mlg image push efficientnet_lite0
    """
    from batcher.images import ImageSettings, push_image

    for model, published in push_image(models, ImageSettings.from_env(os.environ), tag=tag).items():
        click.echo(f"{model} is published as {published.image}, {published.size_bytes / 1e6:.1f} MB ({published.hash})")
