"""`mlg golem check` on a devnet: what it finds when all is well, and for each thing that can be wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from batcher.executors.golem.check import CheckResult, GolemCheck
from batcher.executors.golem.settings import GolemSettings
from devnet.daemon import Devnet
from tests.conftest import DevnetRunner
from tests.devnet.running import failed_calls
from tests.golem import MODEL, provider, scenario
from tests.timing import slowness

PLAN = scenario(provider("alpha"), provider("beta", start="5"))


async def check(net: Devnet, models: Path, *, seconds: float = 1.0, **changes: str) -> dict[str, CheckResult]:
    """Run all checks in a thread. :return: the results by name."""
    variables: Mapping[str, str] = {**os.environ, **net.variables, **changes}
    settings = GolemSettings.from_env(variables)
    checks = GolemCheck(settings, models, [MODEL], environment=variables, seconds=seconds, is_downloading=True)
    results = await asyncio.to_thread(lambda: list(checks.run()))
    assert all(bool(result.remedy) != result.is_ok for result in results), results
    return {result.name: result for result in results}


async def test_all_is_well_and_nothing_stays_open(devnet: DevnetRunner, models_folder: Path) -> None:
    async with devnet(PLAN, models=models_folder) as net:
        found = await check(net, models_folder, seconds=2.0 * slowness())

        image, offers = f"image of {MODEL}", f"offers for {MODEL}"
        assert [name for name, result in found.items() if result.is_ok] == [
            *("daemon", "app key", "gftp", image, "account", "funds", offers)
        ]
        assert found[offers].finding == (
            "2 providers made offers: 1 acceptable, 1 above 0.01 GLM per start (MLG_MAX_PRICE_START). "
            "The cheapest takes 0.4320 GLM per hour and 0.0010 per start."
        )
        assert net.market.list_open_demands() == net.payment.wallet.list_active() == list(net.market.agreements) == []
        assert failed_calls(net) == []


@pytest.mark.parametrize(
    ("changes", "name", "finding", "remedy"),
    [
        ({"YAGNA_APPKEY": ""}, "app key", "YAGNA_APPKEY is not set", "yagna app-key create"),
        ({"YAGNA_APPKEY": "wrong"}, "app key", "does not accept the app key", "yagna app-key list"),
        ({"YAGNA_API_URL": "http://127.0.0.1:9"}, "daemon", "No daemon responds", "yagna service run"),
        ({"PATH": "/nowhere"}, "gftp", "not on the PATH", "Install yagna"),
        ({"MLG_GOLEM_IMAGE": ""}, f"image of {MODEL}", "No image with", "mlg image push"),
        ({"YAGNA_PAYMENT_NETWORK": "polygon"}, "account", "It has: amoy, holesky, hoodi", "--network=polygon"),
        ({"MLG_BUDGET_DAY": "5000"}, "funds", "Not enough funds", "yagna payment fund --network=holesky"),
        ({"YAGNA_SUBNET": "other"}, f"offers for {MODEL}", "No provider", "YAGNA_SUBNET=other"),
        ({"MLG_MAX_PRICE_HOUR": "0.1"}, f"offers for {MODEL}", "1 above 0.1 GLM per hour", "Raise"),
    ],
)
async def test_each_failure_has_a_remedy(
    changes: dict[str, str], name: str, finding: str, remedy: str, devnet: DevnetRunner, models_folder: Path
) -> None:
    async with devnet(PLAN, models=models_folder) as net:
        found = await check(net, models_folder, **changes)

        assert not found[name].is_ok and finding in found[name].finding and remedy in found[name].remedy
        assert net.market.list_open_demands() == net.payment.wallet.list_active() == []


async def test_an_image_with_another_hash_is_found_by_downloading_it(devnet: DevnetRunner, models_folder: Path) -> None:
    async with devnet(PLAN, models=models_folder) as net:
        image_hash, _, url = net.variables["MLG_GOLEM_IMAGE"].partition("@")
        found = await check(net, models_folder, MLG_GOLEM_IMAGE=f"{'0' * 56}@{url}")

        assert f"has the hash {image_hash}, not {'0' * 56}" in found[f"image of {MODEL}"].finding


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('read -r a; echo \'{}\'; read -r b; echo \'{"id": 1, "error": {"message": "no GSB"}}\'', "no GSB"),
        ("echo 'Error: cannot connect to unix:/tmp/yagna.sock' >&2; exit 1", "unix:/tmp/yagna.sock"),
    ],
)
async def test_a_gftp_that_cannot_reach_the_daemon_names_the_socket(
    script: str, reason: str, tmp_path: Path, devnet: DevnetRunner, models_folder: Path
) -> None:
    (tmp_path / "gftp").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "gftp").chmod(0o755)
    async with devnet(PLAN, models=models_folder) as net:
        found: Any = await check(net, models_folder, PATH=f"{tmp_path}:{os.environ['PATH']}")

    assert reason in found["gftp"].finding and "GSB_URL" in found["gftp"].remedy


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000,
        b'HTTP/1.1 200 OK\r\n\r\n{"current": {"version": "1"}}',
    ],
)
def test_whatever_else_listens_at_the_address_is_said_not_to_be_the_daemon(answer: bytes, tmp_path: Path) -> None:
    def respond() -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=respond)
        thread.start()
        settings = GolemSettings(app_key="key", api_url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        checks = GolemCheck(settings, tmp_path, [], environment={}, seconds=1.0, is_downloading=False)
        first, *_ = [result for result in checks.run() if not result.is_ok]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()

    assert first.name in ("daemon", "app key") and "at http://127.0.0.1" in first.finding
