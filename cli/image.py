"""The group `mlg image`: builds the provider image and publishes it for Golem.

The work is done by `batcher/image_build/builder.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from cli.options import environment, file_option, home_option

models_argument = click.argument("models", nargs=-1, required=True, metavar="MODEL...")
tag_option = click.option(
    "--tag",
    metavar="NAME",
    help="Name of the container image on this machine. [default: mlg-provider:MODEL, several names joined by -]",
)


@click.group()
def image() -> None:
    """Build the container image that a Golem provider runs (the provider image), and publish it.

    \b
    Example:
      mlg image build efficientnet_lite0
      MLG_IMAGE_REGISTRY=me/mlg mlg image push efficientnet_lite0
    """


@image.command()
@models_argument
@file_option(
    "--weights",
    "Folder with weights files; all Keras models are compiled from them. [default: download]",
    metavar="DIR",
)
@click.option(
    "--installed",
    is_flag=True,
    help="Fail if a model is not installed in the home, instead of compiling it.",
)
@click.option(
    "--base", metavar="IMAGE", help="Base image, with Python 3.11 or newer. [default: python:3.11-slim-bookworm]"
)
@tag_option
@home_option
def build(models: Sequence[str], weights: Path | None, installed: bool, base: str | None, tag: str | None) -> None:
    """Build a container image with the given models. Uses docker, podman or buildah.

    Needs a source checkout. Models that are installed in the home are copied from there, others of the catalogue are
    compiled during the build; custom models must be installed. The output of the engine goes to stderr; the lines on
    stdout name the image and the digest of each model in it.

    \b
    Example:
      mlg image build efficientnet_lite0
      mlg image build nasnet_mobile --weights ~/weights
      mlg image build densenet121 my_pets --installed
    """
    from batcher.image_build.builder import ImageSettings, build_image

    settings = ImageSettings.from_env(environment())
    name, digests = build_image(models, settings, weights=weights, installed=installed, base=base, tag=tag)
    for model, digest in digests.items():
        click.echo(f"{name} holds {model} (digest {digest[:12]})")


@image.command()
@models_argument
@tag_option
@home_option
def push(models: Sequence[str], tag: str | None) -> None:
    """Publish a container image on Golem's registry. Build it first, for the same models.

    Needs gvmkit-build, a login (gvmkit-build --login) and MLG_IMAGE_REGISTRY=user/repository. The published image is
    recorded in the file images.lock of the home, from which the golem executor takes it.

    \b
    Example:
      MLG_IMAGE_REGISTRY=me/mlg mlg image push efficientnet_lite0
    """
    from batcher.image_build.builder import ImageSettings, push_image

    settings = ImageSettings.from_env(environment())
    for model, published in push_image(models, settings, tag=tag).items():
        click.echo(f"{model} is published as {published.image}, {published.size_bytes / 1e6:.1f} MB ({published.hash})")
