"""The options of a batcher, which `mlg batch` and `mlg up` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from batcher.settings import SHRINK_CHOICES
from provider_image.precision import PRECISIONS


def batcher_options(*, default_max_wait: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add --executor, --workers, --max-wait, --shrink and --precision to a command; a decorator.

    :param default_max_wait: what the command's help names as the default of --max-wait.
    """
    options = (
        click.option(
            "--executor",
            metavar="NAMES",
            help="Where chunks run: local, golem, or golem,local, which prefers golem. [MLG_EXECUTOR; local]",
        ),
        click.option(
            "--workers", type=int, metavar="N", help="Number of local worker processes. [MLG_WORKERS; one per core]"
        ),
        click.option(
            "--max-wait",
            type=float,
            metavar="SECONDS",
            help=f"Maximum time that a request waits for its chunk to fill. [MLG_MAX_WAIT_SECONDS; {default_max_wait}]",
        ),
        click.option(
            "--shrink",
            type=click.Choice(SHRINK_CHOICES),
            help="Resize images to the model's input before they are sent; auto does so where chunks leave this "
            "machine. [MLG_SHRINK; auto]",
        ),
        click.option(
            "--precision",
            type=click.Choice(tuple(PRECISIONS)),
            help="Precision of local workers; bf16 is about twice as fast on processors that support it. "
            "[MLG_PRECISION; f32]",
        ),
    )

    def add_options(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add_options
