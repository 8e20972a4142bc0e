"""The options that commands share, and how an option overrides its MLG_* variable.

Used by every command module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

home_option = click.option(
    "--home", type=click.Path(path_type=Path), metavar="DIR", help="Folder that holds all data. [MLG_HOME; ~/.mlg]"
)
host_option = click.option("--host", metavar="ADDRESS", help="Address to listen on. [MLG_HOST; 127.0.0.1]")
port_option = click.option(
    "--port", type=int, metavar="N", help="Port to listen on; 0 picks a free one. [MLG_PORT; 5000]"
)
open_option = click.option(
    "--open",
    "is_open",
    is_flag=True,
    help="Accept requests from other machines without API keys: anyone who can reach the server may use it. "
    "[MLG_OPEN; off]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON, one object per line.")

#: Seconds of each unit of a duration.
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def environment(**options: Any) -> dict[str, str]:
    """Return a copy of the environment in which each option that was given replaces its MLG_* variable."""
    given = {f"MLG_{name.upper()}": str(value) for name, value in options.items() if value is not None}
    return {**os.environ, **given}


def parse_duration(context: click.Context, parameter: click.Parameter, value: str | None) -> timedelta | None:
    """Parse an option such as 30m, 2h or 7d; a click callback."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([smhd])", value.strip().lower(), re.ASCII)
    if match is None or not float(match[1]):
        raise click.BadParameter(f"{value!r} is not a duration. Write a number and s, m, h or d, for example 2h.")
    return timedelta(seconds=float(match[1]) * _UNIT_SECONDS[match[2]])


def batcher_options(*, default_max_wait: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add --executor, --workers, --max-wait, --shrink and --precision to a command; a decorator.

    :param default_max_wait: what the command's help names as the default of --max-wait.
    """
    from batcher.settings import SHRINK_CHOICES
    from provider_image.precision import PRECISIONS

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
