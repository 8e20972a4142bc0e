"""Fixtures: the bot with the real library on a fake Bot API, and a server in this process."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from werkzeug.serving import BaseWSGIServer, make_server

from server.app import create_app
from server.settings import ServerSettings
from store.files import NewFile
from store.requests import Answer, Claim
from store.store import Store
from telegram_bot.bot import BotTimings, run_bot
from telegram_bot.settings import Secret, TelegramSettings
from tests.conftest import MODEL, OUTPUT
from tests.extensions import install_extension_models
from tests.telegram_bot.fake_bot_api import TOKEN, FakeBotApi
from tests.timing import DEADLINE_SECONDS

USER = 42


@pytest.fixture(scope="session")
def photo() -> bytes:
    """A small photo."""
    file = io.BytesIO()
    Image.radial_gradient("L").resize((64, 48)).convert("RGB").save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def registered(registered_extensions: Path) -> None:
    """The services of `tests/extension`, in this process."""


@pytest.fixture
def settings(tmp_path: Path, models_folder: Path) -> ServerSettings:
    """A home with the starter model, one that makes an image, and one that makes an image of two."""
    home = tmp_path / "home"
    install_extension_models(home / "models")
    (home / "models" / MODEL).symlink_to(models_folder / MODEL)
    return ServerSettings(home=home, server_threads=4)


class LocalServer:
    """A server on loopback that can be stopped and started again at the same address."""

    def __init__(self, settings: ServerSettings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._server: BaseWSGIServer | None = None
        self._port = 0

    @property
    def base(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Serve in a thread."""
        app = create_app(self._settings, self._store)
        self._server = make_server("127.0.0.1", self._port, app, threaded=True)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stop to accept connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@pytest.fixture
def local_server(settings: ServerSettings, store: Store) -> Iterator[LocalServer]:
    """A server in this process."""
    server = LocalServer(settings, store)
    server.start()
    yield server
    server.stop()


@dataclass
class Bench:
    """A fake Bot API and a server, and bots that run one after the other."""

    api: FakeBotApi
    settings: TelegramSettings
    #: The bot that was started last.
    task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def bot(self, **changes: Any) -> AsyncIterator[str]:
        """Run the bot until the block ends, which gets what it said when it was ready."""
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        task = self.task = asyncio.create_task(
            run_bot(
                replace(self.settings, api_url=self.api.base, **changes),
                stop,
                on_ready=ready.set_result,
                timings=BotTimings(models=0.2, models_retry=0.05),
            )
        )
        try:
            await asyncio.wait((task, ready), timeout=DEADLINE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            yield ready.result()
        finally:
            stop.set()
            await task


@pytest.fixture
def bench(tmp_path: Path, local_server: LocalServer) -> Callable[[], AbstractAsyncContextManager[Bench]]:
    """Run a fake Bot API until a block of an async test ends."""

    @asynccontextmanager
    async def run() -> AsyncIterator[Bench]:
        settings = TelegramSettings(
            home=tmp_path / "bot", token=Secret(TOKEN), server_url=local_server.base, rate=1000.0
        )
        async with FakeBotApi().running() as api:
            yield Bench(api, settings)

    return run


@pytest.fixture
def claim(store: Store) -> Callable[[], list[Claim]]:
    """Claim everything that is queued."""

    def claim_all() -> list[Claim]:
        now = datetime.now(UTC)
        return store.requests.claim(
            models=[MODEL, "sepia", "blend_even"],
            limit=100,
            now=now,
            lease_ends_at=now + timedelta(seconds=300),
            oldest_before=None,
        )

    return claim_all


@pytest.fixture
def finish(store: Store) -> Callable[..., None]:
    """Answer claims as a batcher would."""

    def finish_claims(claims: list[Claim], output: Any = OUTPUT, **files: NewFile) -> None:
        answers = [
            Answer(
                claim=claim,
                output=output,
                files=files,
                digest="d" * 64,
                chunk_id="c1",
                provider="local",
                seconds=0.01,
            )
            for claim in claims
        ]
        assert store.requests.finish(answers, now=datetime.now(UTC)) == len(claims)

    return finish_claims
