"""The devnet: a simulated daemon and its providers, in the event loop of this process.

Used by `cli/rentals/devnet.py` and by tests:

    async with Devnet(default_scenario(3), folder=tmp_path, home=home) as devnet:
        os.environ.update(devnet.variables)
        ...
        await devnet.stop()     # as if the daemon was killed; its activities end too
        await devnet.start()    # a new daemon with the same address and state
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from devnet.api.activities import activity_routes
from devnet.api.application import IMAGE_PATH, CallJournal, make_application
from devnet.api.market import market_routes
from devnet.api.payments import payment_routes
from devnet.gftp import remove_dead_servers, write_program
from devnet.image import Image, build_image
from devnet.market import MarketService
from devnet.payments import PaymentService
from devnet.provider.activities import Activities
from devnet.provider.agent import Provider
from devnet.scenario import FaultSchedule, Scenario
from devnet.state import StateStore

HOST = "127.0.0.1"
#: Longest temporary folder for the providers' sockets, whose paths are limited to about 100 bytes.
_MAX_FOLDER_LENGTH = 40


class Devnet:
    """A daemon and its providers. As an async context manager it starts at once, and closes at the end.

    :param folder: for the gftp program, its exchange, and the image of the providers.
    :param home: home whose models the image holds, as they are at the first start; without models if None.
    :param port: port to listen on; if 0, the port of the saved state or a free one. It stays the same over restarts.
    :param state: file of the state that is kept over restarts; in memory if None.
    :param journal: file for a line of JSON about each call.
    :param environment: additional environment variables of the providers' processes.
    :param report: receives a line of text about each important event.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        folder: Path,
        home: Path | None = None,
        port: int = 0,
        state: Path | None = None,
        journal: Path | None = None,
        environment: Mapping[str, str] | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.scenario = scenario
        self.app_key = secrets.token_hex(16)
        self.port = port
        self.journal = CallJournal(journal)
        self.faults = FaultSchedule.from_scenario(scenario)
        self.market: MarketService
        self.payment: PaymentService
        self.activities: Activities
        self._home = home
        self._image: Image | None = None
        self._image_folder = folder.absolute() / "image"
        self._extra_environment = dict(environment or {})
        self._bin, self._exchange = folder.absolute() / "bin", folder.absolute() / "exchange"
        self._state = StateStore(state, self._snapshot)
        self._report = report
        self._activities_folder: Path | None = None
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """Return the daemon's address."""
        return f"http://{HOST}:{self.port}"

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment variables that a requestor needs."""
        return {
            "YAGNA_APPKEY": self.app_key,
            "YAGNA_API_URL": self.url,
            "YAGNA_SUBNET": self.scenario.subnet,
            "MLG_GOLEM_IMAGE": f"{self.image.hash}@{self.url}{IMAGE_PATH.format(name=self.image.hash)}",
            "PATH": os.pathsep.join((str(self._bin), os.environ.get("PATH", os.defpath))),
        }

    @property
    def image(self) -> Image:
        """The image that it publishes."""
        if self._image is None:
            self._image = build_image(self._image_folder, self._home)
        return self._image

    async def start(self) -> None:
        """Start the daemon with the saved state. :raises OSError: the port is in use."""
        saved = self._state.load()
        if saved is not None:
            # The variables of requestors of the previous daemon stay valid.
            self.app_key, self.port = saved["app_key"], self.port or saved["port"]
        self._create_services()
        if saved is not None:
            self.market.load(saved["market"])
            self.payment.load(saved["payment"])
            for agreement in self.market.agreements.values():
                self.activities.restore(agreement)
        self._state.open()
        routes = [
            *market_routes(self.market),
            *payment_routes(self.payment, self.market, self._report),
            *activity_routes(self.activities, self.market),
        ]
        images = {self.image.hash: self.image.to_bytes()}
        app = make_application(routes, app_key=self.app_key, images=images, journal=self.journal, faults=self.faults)
        # handler_cancellation: a call ends when its caller disconnects. shutdown_timeout: `stop` does not wait for
        # calls; 0 would mean no limit.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.01)
        await runner.setup()
        try:
            site = web.TCPSite(runner, HOST, self.port, reuse_address=True)
            await site.start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        self.port = runner.addresses[0][1]
        for provider in self.market.providers.values():
            provider.start()

    async def stop(self) -> None:
        """Stop the daemon as if it was killed: abort calls, kill activities, keep the state."""
        if self._runner is None:
            return
        self.activities.record_usage()
        self._state.close()
        runner, self._runner = self._runner, None
        await runner.cleanup()
        for provider in self.market.providers.values():
            await provider.close()
        await self.activities.close()

    async def close(self) -> None:
        """Stop the daemon for good and remove temporary files."""
        await self.stop()
        self.journal.close()
        remove_dead_servers(self._exchange)
        if self._activities_folder is not None:
            shutil.rmtree(self._activities_folder, ignore_errors=True)
            self._activities_folder = None

    def _create_services(self) -> None:
        self._exchange.parent.mkdir(parents=True, exist_ok=True)
        self._exchange.mkdir(mode=0o700, exist_ok=True)
        write_program(self._bin, self._exchange)
        if self._activities_folder is None:
            base = tempfile.gettempdir()
            self._activities_folder = Path(
                tempfile.mkdtemp(prefix="mlg-dn-", dir=base if len(base) < _MAX_FOLDER_LENGTH else "/tmp")
            )
        self.market = MarketService(on_change=self._state.changed)
        self.payment = PaymentService(funds=self.scenario.funds, on_change=self._state.changed)
        self.activities = Activities(
            folder=self._activities_folder,
            exchange=self._exchange,
            faults=self.faults,
            image=self.image,
            environment={**_environment(), **self._extra_environment},
            on_change=self._state.changed,
        )
        cores = 0
        for plan in self.scenario.providers:
            self.market.providers[plan.node_id] = Provider(
                plan,
                scenario=self.scenario,
                market=self.market,
                payment=self.payment,
                activities=self.activities,
                faults=self.faults,
                cpus=_assign_cpus(cores, plan.cores),
                report=self._report,
            )
            cores += plan.cores

    def _snapshot(self) -> dict[str, Any]:
        return {
            "app_key": self.app_key,
            "port": self.port,
            "market": self.market.dump(),
            "payment": self.payment.dump(),
        }


def _assign_cpus(offset: int, cores: int) -> frozenset[int]:
    """Choose a provider's processor cores, after `offset` cores of other providers; shared if there are too few."""
    available = sorted(os.sched_getaffinity(0))
    return frozenset(available[(offset + number) % len(available)] for number in range(min(cores, len(available))))


def _environment() -> Mapping[str, str]:
    """Make the environment of the providers' processes: nothing of a requestor."""
    variables = {key: os.environ[key] for key in ("LANG", "LC_ALL", "TZ", "TMPDIR") if key in os.environ}
    return {"PATH": os.defpath, **variables}
