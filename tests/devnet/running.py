"""A devnet in the event loop of a test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from devnet.daemon import Devnet
from devnet.scenario import Scenario


@asynccontextmanager
async def run_devnet(
    folder: Path, scenario: Scenario, *, models: Path | None = None, **options: Any
) -> AsyncIterator[Devnet]:
    """Run a devnet until the block ends.

    :param folder: for everything that it needs; it continues with the state of an earlier one there if asked to.
    :param models: the folder of artefacts, for the providers.
    :param options: of `Devnet`.
    """
    if models is not None:
        options["home"] = folder / "providers"
        options["home"].mkdir()
        (options["home"] / "models").symlink_to(models)
    async with Devnet(scenario, folder=folder / "devnet", **options) as devnet:
        yield devnet
