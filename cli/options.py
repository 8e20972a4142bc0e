"""The options that commands share, and how an option replaces its MLG_* variable.

Used by every command module. A command does not receive the options that are settings: it calls `environment`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]
#: Seconds of each unit of a duration.
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
#: Where a click context keeps the settings that were given as options; a subcommand adds to those of its group.
_GIVEN = "mlg.given"


def setting_option(name: str, variable: str, **attributes: Any) -> Callable[[Command], Command]:
    """Create an option that replaces an environment variable; a decorator. :param attributes: those of click.option."""

    def keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is not None and value is not False:
            context.meta.setdefault(_GIVEN, {})[variable] = "1" if value is True else str(value)

    return click.option(name, callback=keep, expose_value=False, **attributes)


def environment() -> dict[str, str]:
    """Return a copy of the environment in which each setting that was given as an option replaces its variable."""
    return {**os.environ, **click.get_current_context().meta.get(_GIVEN, {})}


def with_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Add options to a command, in this order; a decorator."""

    def add_options(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add_options


def file_option(name: str, help: str, *, metavar: str = "FILE", **attributes: Any) -> Callable[[Command], Command]:
    """Create an option that takes a path; a decorator. :param attributes: those of click.Path."""
    return click.option(name, type=click.Path(path_type=Path, **attributes), metavar=metavar, help=help)


home_option = setting_option(
    "--home",
    "MLG_HOME",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder that holds all data. [MLG_HOME; ~/.mlg]",
)
server_options = with_options(
    setting_option("--host", "MLG_HOST", metavar="ADDRESS", help="Address to listen on. [MLG_HOST; 127.0.0.1]"),
    setting_option(
        "--port", "MLG_PORT", type=int, metavar="N", help="Port to listen on; 0 picks a free one. [MLG_PORT; 5000]"
    ),
    setting_option(
        "--open",
        "MLG_OPEN",
        is_flag=True,
        help="Accept requests from other machines without API keys: anyone who can reach the server may use it. "
        "[MLG_OPEN; off]",
    ),
)
url_option = click.option("--url", metavar="URL", help="Address of the server. [MLG_URL; http://127.0.0.1:5000]")
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON, one object per line.")


def parse_duration(context: click.Context, parameter: click.Parameter, value: str | None) -> timedelta | None:
    """Parse an option such as 30m, 2h or 7d; a click callback."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([smhd])", value.strip().lower(), re.ASCII)
    if match is None or not float(match[1]):
        raise click.BadParameter(f"{value!r} is not a duration. Write a number and s, m, h or d, for example 2h.")
    return timedelta(seconds=float(match[1]) * _UNIT_SECONDS[match[2]])


def batcher_options(*, default_max_wait: str) -> Callable[[Command], Command]:
    """Add --executor, --workers, --max-wait, --shrink and --precision to a command; a decorator.

    :param default_max_wait: what the command's help names as the default of --max-wait.
    """
    from batcher.settings import SHRINK_CHOICES
    from provider_image.precision import FASTEST, PRECISIONS

    return with_options(
        setting_option(
            "--executor",
            "MLG_EXECUTOR",
            metavar="NAMES",
            help="Where chunks run: local, golem, or golem,local, which prefers golem. [MLG_EXECUTOR; local]",
        ),
        setting_option(
            "--workers",
            "MLG_WORKERS",
            type=int,
            metavar="N",
            help="Number of local worker processes. [MLG_WORKERS; one a core, at most 8]",
        ),
        setting_option(
            "--max-wait",
            "MLG_MAX_WAIT_SECONDS",
            type=float,
            metavar="SECONDS",
            help=f"Maximum time that a request waits for its chunk to fill. [MLG_MAX_WAIT_SECONDS; {default_max_wait}]",
        ),
        setting_option(
            "--shrink",
            "MLG_SHRINK",
            type=click.Choice(SHRINK_CHOICES),
            help="Resize images to the model's input before they are sent; auto does so where chunks leave this "
            "machine, and compresses them unless transfers prove to be quick; on always compresses, uncompressed "
            "never. [MLG_SHRINK; auto]",
        ),
        setting_option(
            "--precision",
            "MLG_PRECISION",
            type=click.Choice((*PRECISIONS, FASTEST)),
            help="Precision of local workers; bf16 is about twice as fast on processors that support it; fastest takes "
            "the quickest copy of a model that passed on this processor, see mlg models compile. [MLG_PRECISION; f32]",
        ),
    )
