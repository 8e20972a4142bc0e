"""The command `mlg devnet`.

The only module of the product that imports the package devnet, inside functions, because devnet needs an extra.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import environment, file_option, home_option
from provider_image.errors import ConfigError
from store.settings import HomeSettings

if TYPE_CHECKING:
    from devnet.daemon import Devnet
    from devnet.scenario import Scenario

DEFAULT_PROVIDERS = 3
STARTER_MODELS = ("efficientnet_lite0", "efficientnet_lite0_embedding")


@click.command()
@click.option("--providers", type=click.IntRange(1, 100), metavar="N", help="Number of providers without faults. [3]")
@file_option("--scenario", "TOML file that describes the providers and the faults to inject.", dir_okay=False)
@click.option(
    "--port", type=click.IntRange(0, 65535), metavar="N", help="Port to listen on; 0, the default, selects a free one."
)
@file_option(
    "--env-file", "Write the environment variables to this file too, when the devnet is ready.", dir_okay=False
)
@file_option(
    "--state", "Save demands, agreements and payments in this file, and load them at the next start.", dir_okay=False
)
@file_option("--journal", "Append every API call to this file, one JSON object per line.", dir_okay=False)
@click.option("--subnet", metavar="NAME", help="Subnet of the offers. [the scenario's, or devnet]")
@home_option
def devnet(
    providers: int | None, scenario: Path | None, port: int | None, subnet: str | None, **files: Path | None
) -> None:
    """Run a simulated Golem network on this computer until Ctrl-C or SIGTERM, for trying out and for tests.

    Its providers run jobs as processes of the current user, from an image with the models that are installed in the
    home when the devnet starts. No money is involved. The environment variables for a requestor are written to stdout,
    a log of events to stderr.

    \b
    Example:
      mlg devnet --providers 3 --env-file /tmp/devnet.sh &
      . /tmp/devnet.sh
      mlg batch --once --executor golem
    """
    home = HomeSettings.from_env(environment()).home
    from devnet.scenario import default_scenario, read_scenario

    if providers is not None and scenario is not None:
        raise ConfigError("--providers and --scenario cannot be used together: the scenario describes the providers.")
    plan = default_scenario(providers or DEFAULT_PROVIDERS) if scenario is None else read_scenario(scenario)
    if subnet is not None:
        plan = replace(plan, subnet=subnet)
    _require_aiohttp()
    from cli.logs import configure_logging

    configure_logging()
    from provider_image.compiler import ensure_installed

    # So that the image is of use in a new home too; a batcher would install it with the first request.
    for name in STARTER_MODELS:
        ensure_installed(home / "models", name)
    import asyncio

    asyncio.run(_run(plan, home=home, port=port or 0, **files))


def _require_aiohttp() -> None:
    try:
        import aiohttp  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            "mlg devnet needs aiohttp. Install it: scripts/setup devnet, or pip install 'mlg[devnet]'"
        ) from error


async def _run(
    scenario: Scenario, *, home: Path, port: int, env_file: Path | None, state: Path | None, journal: Path | None
) -> None:
    import asyncio
    import contextlib
    import signal
    import tempfile

    from devnet.daemon import Devnet

    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    if env_file is not None:
        # A script that waits for the file must not find that of an earlier devnet.
        env_file.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        if state is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlg-devnet-")))
        else:
            # A requestor that survives a restart of the daemon continues to use the gftp program in this folder.
            folder = state.with_name(state.name + ".d")
        try:
            net = Devnet(
                scenario,
                folder=folder,
                home=home,
                port=port,
                state=state,
                journal=journal,
                report=lambda line: click.echo(f"devnet: {line}", err=True),
            )
        except OSError as error:
            raise ConfigError(f"The journal {journal} cannot be written: {error.strerror}") from error
        try:
            try:
                await net.start()
                lines = _exports(net)
                if env_file is not None:
                    _write_private(env_file, lines)
            except OSError as error:
                raise ConfigError(f"The devnet cannot start: {error}") from error
            click.echo(lines, nl=False)
            names = ", ".join(provider.name for provider in scenario.providers)
            click.echo(f"devnet: listening at {net.url}, providers: {names}. Press Ctrl-C to stop.", err=True)
            await stopping.wait()
        finally:
            await net.close()
    click.echo("devnet: stopped", err=True)


def _exports(net: Devnet) -> str:
    """Format the environment variables as shell commands."""
    variables = dict(net.variables)
    first = variables.pop("PATH").split(os.pathsep)[0]
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join([*lines, f'export PATH={shlex.quote(first)}:"$PATH"', ""])


def _write_private(path: Path, text: str) -> None:
    """Write a file atomically, readable only by its owner, because it contains the app key."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.touch(mode=0o600)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
