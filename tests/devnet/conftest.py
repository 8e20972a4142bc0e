"""The fixture of the tests that make calls of a devnet."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from devnet.scenario import Scenario
from tests.conftest import DevnetRunner
from tests.devnet.requestor import Requestor, RequestorRunner


@pytest.fixture
def requestor(devnet: DevnetRunner) -> RequestorRunner:
    """Run a devnet and a requestor of it until a block ends, with the arguments of `devnet`."""

    @asynccontextmanager
    async def run(scenario: Scenario, **options: Any) -> AsyncIterator[Requestor]:
        async with devnet(scenario, **options) as net, aiohttp.ClientSession() as session:
            yield Requestor(net, session)

    return run
