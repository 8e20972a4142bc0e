"""A devnet that runs in this process: for `mlg devnet`, and for tests that look inside.

async with running(default_scenario(3), folder=tmp_path, home=home) as devnet:
    os.environ.update(devnet.variables)
    ...
    await devnet.stop()     # the daemon dies: its activities with it
    await devnet.start()    # another takes its place, at the same address and with the same state
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devnet.faults import Faults
from devnet.gftp import write_program
from devnet.journal import CallJournal
from devnet.market import MarketService
from devnet.payments import PaymentService
from devnet.provider.activities import Activities, assign_cpus
from devnet.provider.agent import Provider
from devnet.scenario import Scenario
from devnet.state import StateStore
from devnet.transfers import Transfers

if TYPE_CHECKING:
    from aiohttp import web

#: The requestor's node id.
REQUESTOR_ID = "0x" + "de" * 20
HOST = "127.0.0.1"
#: Longest folder under which the providers' sockets, whose paths are limited to about 100 bytes, still fit.
_MAX_FOLDER_LENGTH = 40


def _discard(line: str) -> None:
    pass


class Devnet:
    """A daemon and its providers. Made by `run_devnet`, or by whoever calls `start` and `close` himself.

    :param folder: gets the gftp program and what it exchanges.
    :param home: whose models the providers have.
    :param port: to listen on; if 0 that of the state, else a free one; the same after every `start`.
    :param environment: variables that the providers' processes get beside their own.
    :param state: what is kept across restarts; in memory if None.
    :param report: gets a line for people about everything important.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        folder: Path,
        home: Path | None = None,
        port: int = 0,
        app_key: str | None = None,
        state: Path | None = None,
        journal: Path | None = None,
        environment: Mapping[str, str] | None = None,
        report: Callable[[str], None] = _discard,
    ) -> None:
        self.scenario = scenario
        self.app_key = app_key or secrets.token_hex(16)
        self.port = port
        self.journal = CallJournal(journal)
        self.faults = Faults.from_scenario(scenario)
        self.market: MarketService
        self.payment: PaymentService
        self.activities: Activities
        self.providers: dict[str, Provider] = {}
        self._home = home
        self._extra_environment = dict(environment or {})
        self._folder = folder
        self._state = StateStore(state)
        self._report = report
        self._activities_folder: Path | None = None
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Return the daemon's address."""
        return f"http://{HOST}:{self.port}"

    @property
    def variables(self) -> dict[str, str]:
        """Return what a requestor must have in its environment."""
        return {
            "YAGNA_APPKEY": self.app_key,
            "YAGNA_API_URL": self.url,
            "YAGNA_SUBNET": self.scenario.subnet,
            "PATH": os.pathsep.join((str(self._bin), os.environ.get("PATH", os.defpath))),
        }

    @property
    def is_running(self) -> bool:
        """Tell whether it can be called."""
        return self._runner is not None

    async def start(self) -> None:
        """Start the daemon, with what the one before it knew.

        :raises OSError: the port is taken.
        """
        from aiohttp import web

        from devnet.api import make_application
        from devnet.api.activities import ActivityRoutes
        from devnet.api.market import MarketRoutes
        from devnet.api.payments import PaymentRoutes

        saved = self._state.load()
        if saved is not None:
            # Requestors that were told of the one before find this one.
            self.app_key, self.port = saved["app_key"], self.port or saved["port"]
        self._create_services()
        if saved is not None:
            self.market.load(saved["market"])
            self.payment.load(saved["payment"])
            for agreement in self.market.agreements.values():
                self.activities.restore(agreement)
        self._state.attach(self._snapshot)
        routes = [
            *MarketRoutes(self.market, self.providers).routes(),
            *PaymentRoutes(self.payment, self.market, self.providers, self._report).routes(),
            *ActivityRoutes(self.activities, self.market, self.providers).routes(),
        ]
        app = make_application(
            routes, identity=REQUESTOR_ID, app_key=self.app_key, journal=self.journal, faults=self.faults
        )
        # A caller that goes away ends what it waited for. At the end nobody is waited for: a daemon that dies is rude.
        # aiohttp takes 0 for no limit at all.
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
        for provider in self.providers.values():
            provider.start()

    async def stop(self) -> None:
        """Have the daemon die: calls are cut off, activities are killed, the state stays."""
        if self._runner is None:
            return
        self.activities.record_usage()
        self._state.save()
        self._state.detach()
        runner, self._runner = self._runner, None
        await runner.cleanup()
        for provider in self.providers.values():
            await provider.close()
        await self.activities.close()

    async def close(self) -> None:
        """Stop for good and remove what was temporary."""
        await self.stop()
        self.journal.close()
        Transfers(self._exchange).remove_dead_servers()
        if self._activities_folder is not None:
            shutil.rmtree(self._activities_folder, ignore_errors=True)
            self._activities_folder = None

    def _create_services(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._exchange.mkdir(mode=0o700, exist_ok=True)
        write_program(self._bin, self._exchange, node_id=REQUESTOR_ID)
        if self._activities_folder is None:
            base = tempfile.gettempdir()
            self._activities_folder = Path(
                tempfile.mkdtemp(prefix="mlg-dn-", dir=base if len(base) < _MAX_FOLDER_LENGTH else "/tmp")
            )
        schedule_save = self._state.schedule_save
        self.market = MarketService(requestor_id=REQUESTOR_ID, on_change=schedule_save)
        self.payment = PaymentService(requestor_id=REQUESTOR_ID, funds=self.scenario.funds, on_change=schedule_save)
        self.activities = Activities(
            folder=self._activities_folder,
            transfers=Transfers(self._exchange),
            faults=self.faults,
            environment={**_environment(self._home), **self._extra_environment},
            on_change=schedule_save,
        )
        self.providers.clear()
        cores = 0
        for plan in self.scenario.providers:
            self.providers[plan.node_id] = Provider(
                plan,
                scenario=self.scenario,
                market=self.market,
                payment=self.payment,
                activities=self.activities,
                faults=self.faults,
                cpus=assign_cpus(cores, plan.cores),
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

    @property
    def _bin(self) -> Path:
        return self._folder.absolute() / "bin"

    @property
    def _exchange(self) -> Path:
        return self._folder.absolute() / "exchange"


@asynccontextmanager
async def run_devnet(
    scenario: Scenario,
    *,
    folder: Path,
    home: Path | None = None,
    port: int = 0,
    app_key: str | None = None,
    state: Path | None = None,
    journal: Path | None = None,
    environment: Mapping[str, str] | None = None,
    report: Callable[[str], None] = _discard,
) -> AsyncIterator[Devnet]:
    """Run a devnet in this event loop. See `Devnet` for the parameters."""
    devnet = Devnet(
        scenario,
        folder=folder,
        home=home,
        port=port,
        app_key=app_key,
        state=state,
        journal=journal,
        environment=environment,
        report=report,
    )
    try:
        await devnet.start()
        yield devnet
    finally:
        await devnet.close()


def _environment(home: Path | None) -> Mapping[str, str]:
    """Make what the providers' processes see: this Python's programs, the models, and nothing of the requestor's."""
    variables = {key: os.environ[key] for key in ("LANG", "LC_ALL", "TZ", "TMPDIR") if key in os.environ}
    scripts = str(Path(sys.executable).parent)
    variables["PATH"] = os.pathsep.join((scripts, os.environ.get("PATH", os.defpath)))
    if home is not None:
        variables["MLG_HOME"] = str(home.absolute())
    return variables
