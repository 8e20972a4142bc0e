"""The options that commands share, and how an option overrides its MLG_* variable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

home_option = click.option(
    "--home", type=click.Path(path_type=Path), metavar="DIR", help="Folder of all data. [MLG_HOME; ~/.mlg]"
)
host_option = click.option("--host", metavar="ADDRESS", help="Address to listen on. [MLG_HOST; 127.0.0.1]")
port_option = click.option(
    "--port", type=int, metavar="N", help="Port to listen on; 0 takes a free one. [MLG_PORT; 5000]"
)
open_option = click.option(
    "--open",
    "is_open",
    is_flag=True,
    help="Serve other machines although there are no API keys, so that anybody may use it. [MLG_OPEN]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON, one object a line.")


def environment(**options: Any) -> dict[str, str]:
    """Return a copy of the environment in which the options that were given stand as MLG_* variables."""
    given = {f"MLG_{name.upper()}": str(value) for name, value in options.items() if value is not None}
    return {**os.environ, **given}
