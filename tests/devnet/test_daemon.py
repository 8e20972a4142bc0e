"""The devnet as a whole: yapapi, restarts, the daemon's faults, the journal, and the command."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import aiohttp
import pytest

from devnet.scenario import Fault, default_scenario
from provider_image.errors import ConfigError
from tests.conftest import DevnetRunner
from tests.devnet.requestor import ACTIVITY, MARKET, PAYMENT, RequestorRunner, run_command, single_provider
from tests.devnet.running import calls_matching, failed_calls
from tests.timing import DEADLINE_SECONDS, until

ROOT = Path(__file__).parents[2]
MLG = Path(sys.executable).with_name("mlg")


async def test_yapapi_completes_six_tasks_and_pays_for_them(devnet: DevnetRunner, tmp_path: Path) -> None:
    async with devnet(default_scenario(3)) as net:
        program = await asyncio.create_subprocess_exec(
            sys.executable,
            "-W",
            "ignore",
            str(Path(__file__).with_name("yapapi_tasks.py")),
            str(tmp_path),
            env={**os.environ, **net.variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, errors = await program.communicate()

        assert program.returncode == 0, errors.decode()
        printed = json.loads(out)
        assert printed["answers"] == {str(number): f"TASK {number}" for number in range(6)}
        assert len(printed["providers"]) >= 2
        # yapapi may still poll a demand that it closes at the same moment.
        polls = calls_matching(net, "GET /market-api/v1/demands/*/events")
        assert [call for call in failed_calls(net) if call not in polls] == []
        bills = list(net.payment.invoices.values())
        assert {bill.status for bill in bills} == {"ACCEPTED"}
        assert len(bills) == len(net.market.agreements) == len(printed["providers"])
        assert net.payment.wallet.free_funds == 1000 - sum((bill.amount for bill in bills), Decimal(0))
        assert net.market.list_open_demands() == net.payment.wallet.list_active() == []
        assert {each.state for each in net.market.agreements.values()} == {"Terminated"}


# Restarts


@pytest.mark.parametrize("has_file", [True, False])
async def test_a_restarted_daemon_has_its_state(requestor: RequestorRunner, tmp_path: Path, has_file: bool) -> None:
    state = tmp_path / "state.json" if has_file else None
    async with requestor(single_provider(), state=state) as client:
        devnet = client.devnet
        demand_id = await client.subscribe()
        await client.complete_agreement(demand_id)
        first = await client.invoice()
        assert first is not None
        agreement_id = await client.agree(demand_id)
        activity_id = await client.activity(agreement_id)
        await client.results(activity_id, await client.execute(activity_id))
        pid_file = tmp_path / "pid"
        batch_id = await client.execute(activity_id, run_command("/bin/sh", "-c", f"echo $$ > {pid_file}; sleep 60"))
        await until(lambda: pid_file.exists() and pid_file.read_text().strip())
        url = devnet.url

        await devnet.stop()
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.request("GET", "/me")
        assert not Path("/proc", pid_file.read_text().strip()).exists()
        await devnet.start()

        assert devnet.url == url
        path = f"{ACTIVITY}/activity/{activity_id}"
        assert (await client.request_ok("GET", f"{path}/state"))["state"] == ["Terminated", None]
        assert (await client.request("GET", f"{path}/exec/{batch_id}"))[0] == 404
        assert (await client.request_ok("GET", f"{path}/usage"))["currentUsage"][1] > 0
        await client.destroy(activity_id)
        assert [each["demandId"] for each in await client.request_ok("GET", f"{MARKET}/demands")] == [demand_id]
        assert (await client.request_ok("GET", f"{MARKET}/agreements/{agreement_id}"))["state"] == "Approved"
        assert await client.accept("invoices", first["invoiceId"], first["amount"]) == (200, None)
        await client.activity(agreement_id)
        await client.terminate(agreement_id)
        second = await client.invoice(devnet.payment.invoice_events[0]["eventDate"])
        assert second is not None and activity_id in second["activityIds"]
        assert await client.remaining() == 1 - Decimal(first["amount"])


async def test_a_new_daemon_loads_the_state_file_of_another(requestor: RequestorRunner, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    async with requestor(single_provider(Fault(kind="late-bill", seconds=0.3)), state=state) as client:
        await client.complete_agreement(await client.subscribe())
        allocation_id, key, url = client.allocation_id, client.devnet.app_key, client.devnet.url
    document = json.loads(state.read_text())
    for agreement in document["market"]["agreements"]:
        del agreement["price_factor"]  # version 0.1.0 had no such field, but another one
        agreement["session_id"] = None
    state.write_text(json.dumps(document))
    async with requestor(single_provider(), state=state) as client:
        assert (client.devnet.app_key, client.devnet.url) == (key, url)
        assert (await client.request_ok("GET", f"{PAYMENT}/allocations"))[0]["allocationId"] == allocation_id
        assert await client.invoice() is not None  # for the agreement of the first daemon


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 99}'])
async def test_an_invalid_state_file_is_rejected(devnet: DevnetRunner, tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)

    with pytest.raises(ConfigError, match="state"):
        async with devnet(single_provider(), state=tmp_path / "state.json"):
            pass


# The daemon's faults


async def test_calls_fail_hang_and_are_aborted_as_the_scenario_says(requestor: RequestorRunner) -> None:
    faults = (
        Fault(kind="http-500", path="GET */invoiceEvents", after=1, times=1),
        Fault(kind="http-hang", path="GET /me", times=1),
        Fault(kind="http-hang", path="GET /version/get", seconds=0.1),
        Fault(kind="gone", path="GET */demands", times=2),  # aiohttp's client retries once
    )

    async with requestor(single_provider(daemon=faults)) as client:
        statuses = [(await client.request("GET", f"{PAYMENT}/invoiceEvents", timeout=0))[0] for _ in range(3)]
        assert statuses == [200, 500, 200]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.request("GET", "/me")
        assert (await client.request("GET", "/me"))[0] == 200
        await client.request_ok("GET", "/version/get")
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.request("GET", f"{MARKET}/demands")
        assert (await client.request("GET", f"{MARKET}/demands"))[0] == 200
        (slow,) = calls_matching(client.devnet, "GET /version/*")
        assert slow.seconds >= 0.1


async def test_a_vanished_activity_blocks_neither_other_calls_nor_the_end_of_its_agreement(
    requestor: RequestorRunner,
) -> None:
    async with requestor(single_provider(Fault(kind="vanish-http"))) as client:
        agreement_id = await client.agree(await client.subscribe())
        activity_id = await client.activity(agreement_id)
        await client.execute(activity_id)
        await client.execute(activity_id, run_command("true"))
        unit = client.devnet.activities.find(activity_id).unit
        await until(lambda: unit.vanished)
        path = f"{ACTIVITY}/activity/{activity_id}"
        for method, end in (("GET", "/state"), ("GET", "/usage"), ("DELETE", "")):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await client.request(method, path + end)
        await client.request_ok("GET", "/me")
        await client.terminate(agreement_id)
        assert await client.invoice() is not None


# The journal


async def test_every_call_is_in_the_journal(requestor: RequestorRunner, tmp_path: Path) -> None:
    file = tmp_path / "logs" / "journal.jsonl"
    async with requestor(single_provider(), journal=file) as client:
        await client.allocate("0.25")
        await client.request("GET", f"{PAYMENT}/allocations/none")
        (failed,) = failed_calls(client.devnet)
        assert (failed.status, failed.path) == (404, f"{PAYMENT}/allocations/none")
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert (first["method"], first["status"]) == ("POST", 201)
    assert json.loads(first["request"])["totalAmount"] == "0.25"
    assert first["answer_bytes"] == len(first["answer"]) > 0
    assert second["status"] == 404


# The command


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_writes_its_env_file_when_ready_and_ends_cleanly(tmp_path: Path, number: int) -> None:
    file, temporary = tmp_path / "env.sh", tmp_path / "tmp"
    temporary.mkdir()
    file.write_text("old")
    arguments = ["devnet", "--providers", "2", "--home", str(tmp_path / "home"), "--subnet", "mine"]
    program = subprocess.Popen(
        [str(MLG), *arguments, "--env-file", str(file), "--state", str(tmp_path / "state.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    try:
        assert program.stderr is not None
        ready = program.stderr.readline()
        shown = file.read_text()
        commands = '. "$1"; command -v gftp; echo "$YAGNA_SUBNET"; gftp server < /dev/null'
        found = subprocess.run(["sh", "-c", commands, "sh", str(file)], capture_output=True, text=True, check=True)
        program.send_signal(number)
        out, errors = program.communicate(timeout=DEADLINE_SECONDS)
    finally:
        program.kill()

    assert "alpha, beta" in ready
    assert program.returncode == 0, errors
    assert out == shown and out.count("export ") == 5
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert found.stdout.split() == [str(tmp_path / "state.json.d" / "bin" / "gftp"), "mine"]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--scenario", "absent.toml"], "absent.toml"),
        (["--providers", "0"], "0 is not in the range"),
        (["--providers", "1", "--scenario", "absent.toml"], "together"),
    ],
)
def test_the_command_rejects_invalid_options(tmp_path: Path, arguments: list[str], reason: str) -> None:
    done = subprocess.run([str(MLG), "devnet", *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)

    assert done.returncode == 2
    assert reason in done.stderr


def test_the_command_names_the_extra_when_aiohttp_is_missing(tmp_path: Path) -> None:
    code = "import sys; sys.modules['aiohttp'] = None; import mlg; mlg.main(['devnet'])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "scripts/setup devnet" in done.stderr and "mlg[devnet]" in done.stderr


def test_only_the_command_imports_the_devnet_and_only_in_functions() -> None:
    found = set()
    for folder in ("provider_image", "store", "server", "batcher", "cli", "mlg_client"):
        for path in (ROOT / folder).rglob("*.py"):
            if re.search(r"^\s*(from|import) devnet\b", path.read_text(), re.MULTILINE):
                found.add(str(path.relative_to(ROOT)))
    code = "import sys, cli.rentals.devnet; sys.exit(any(name.split('.')[0] == 'devnet' for name in sys.modules))"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert found == {"cli/rentals/devnet.py"}
    assert done.returncode == 0
