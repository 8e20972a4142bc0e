"""The command `mlg devnet`.

Found through the table in `mlg.py`. Whatever needs aiohttp is imported when it runs.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import environment, home_option
from provider_image.errors import ConfigError
from store.settings import HomeSettings

if TYPE_CHECKING:
    from devnet.daemon import Devnet
    from devnet.scenario import Scenario

DEFAULT_PROVIDERS = 3


@click.command()
@click.option("--providers", type=click.IntRange(1, 100), metavar="N", help="How many providers, all honest. [3]")
@click.option(
    "--scenario",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A TOML file that says which providers there are and what goes wrong.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), metavar="N", help="Port to listen on; 0, the default, takes a free one."
)
@click.option(
    "--env-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the variables to this file as well, when the devnet is ready.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep demands, agreements and money here, to go on with them when it is started again.",
)
@click.option(
    "--journal",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write every call down here, a JSON object a line.",
)
@click.option("--subnet", metavar="NAME", help="The subnet of its offers. [the scenario's, or devnet]")
@home_option
def devnet(
    providers: int | None,
    scenario: Path | None,
    port: int | None,
    env_file: Path | None,
    state: Path | None,
    journal: Path | None,
    subnet: str | None,
    home: Path | None,
) -> None:
    """Run a small Golem network on this computer until Ctrl-C or SIGTERM, to try things out on.

    Its providers run what they are sent as processes of yours, with the models of the home; no money is involved. The
    variables that a requestor needs are written to stdout, what happens to stderr.

    \b
    Example:
      mlg devnet --providers 3 --env-file /tmp/devnet.sh &
      . /tmp/devnet.sh
      mlg batch --once --executor golem
    """
    settings = HomeSettings.from_env(environment(home=home))
    from devnet.scenario import default_scenario, read_scenario

    if providers is not None and scenario is not None:
        raise ConfigError("A scenario says which providers there are; --providers cannot stand beside it.")
    plan = default_scenario(providers or DEFAULT_PROVIDERS) if scenario is None else read_scenario(scenario)
    if subnet is not None:
        plan = replace(plan, subnet=subnet)
    from cli.logs import configure_logging

    configure_logging()
    import asyncio

    asyncio.run(_run(plan, home=settings.home, port=port or 0, env_file=env_file, state=state, journal=journal))


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
        # Whoever waits for it shall not find that of an earlier devnet.
        env_file.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        if state is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlg-devnet-")))
        else:
            # A requestor that outlives this daemon still has the gftp program of this folder.
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
            click.echo(f"devnet: ready at {net.url} with {names}; Ctrl-C ends it", err=True)
            await stopping.wait()
        finally:
            await net.close()
    click.echo("devnet: ended", err=True)


def _exports(net: Devnet) -> str:
    """Write the variables for a shell."""
    variables = dict(net.variables)
    first = variables.pop("PATH").split(os.pathsep)[0]
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join([*lines, f'export PATH={shlex.quote(first)}:"$PATH"', ""])


def _write_private(path: Path, text: str) -> None:
    """Write a file at once and for its owner only: it holds a key."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.touch(mode=0o600)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
