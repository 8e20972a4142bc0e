"""The whole system on rented computers, as users run it: mlg devnet in one process, mlg batch or mlg up in another."""

from __future__ import annotations

import json
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from devnet.scenario import PROVIDER_NAMES
from scripts.benchmarks.execution import golem
from scripts.benchmarks.support import processes, stored_requests
from server.settings import ServerSettings
from store.states import RequestState
from store.store import Store
from tests.golem import make_image
from tests.system import System
from tests.timing import wait_until


def make_home(folder: Path, models: Path) -> Path:
    # A copy: the devnet installs further models.
    shutil.copytree(models, folder / "models")
    return folder


def paid_by_the_daemon(variables: dict[str, str]) -> Decimal:
    invoices = golem.query_daemon(variables, "/payment-api/v1/invoices")
    return sum((Decimal(each["amount"]) for each in invoices if each["status"] != "RECEIVED"), Decimal(0))


def costs(home: Path, by: str) -> list[dict[str, Any]]:
    command = processes.mlg("costs", "--by", by, "--json", "--home", str(home))
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def assert_nothing_is_open(variables: dict[str, str]) -> None:
    assert golem.query_daemon(variables, "/market-api/v1/agreements?state=Approved") == []
    assert golem.query_daemon(variables, "/market-api/v1/demands") == []
    assert golem.query_daemon(variables, "/payment-api/v1/allocations") == []


@pytest.mark.slow
def test_two_thousand_images_over_eight_providers_of_which_three_misbehave(tmp_path: Path, models_folder: Path) -> None:
    home, providers = make_home(tmp_path / "home", models_folder), make_home(tmp_path / "providers", models_folder)
    data = make_image()
    stored_requests.add_images(home, [data + b"%d" % number for number in range(2000)])
    log = tmp_path / "batch.log"

    with golem.devnet(tmp_path, providers, golem.scenario(tmp_path, 8, golem.FAULTS)) as variables:
        # Enough for eight providers at a time, each with a start and a chunk that take as long as they may.
        limits = {"MLG_CHUNK_TIMEOUT_SECONDS": "30", "MLG_GOLEM_START_SECONDS": "30"}
        golem.batch(home, "golem", log, **variables, MLG_BUDGET_DAY="0.2", **limits)
        daemons = paid_by_the_daemon(variables)
        assert_nothing_is_open(variables)

    store = Store(ServerSettings(home=home, busy_seconds=5))
    requests = store.requests.list(limit=3000)
    chunks = store.chunks.list(limit=3000)
    answers = sum(chunk.answers for chunk in chunks)
    store.close()
    assert [request.state for request in requests] == [RequestState.DONE] * 2000
    assert answers == 2000  # none was answered twice
    # A bill of no more than this: each of eight starts costs 0.001, and the work some minutes of one core.
    assert golem.paid(home) == daemons <= Decimal("0.1")
    for by in ("day", "model", "provider"):
        total = sum((Decimal(row["paid"]) for row in costs(home, by) if row["by"] != "total"), Decimal(0))
        assert total == daemons
    assert 0 < sum(request.cost or Decimal(0) for request in requests) <= daemons
    failed = {row["name"] for row in _providers(home) if row["failed"]}
    assert failed == set(golem.FAULTS)


def _providers(home: Path) -> list[dict[str, Any]]:
    command = processes.mlg("providers", "list", "--json", "--home", str(home))
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


@pytest.mark.slow
def test_killed_batchers_lose_nothing_and_leave_nothing_open(tmp_path: Path, models_folder: Path) -> None:
    home, providers = make_home(tmp_path / "home", models_folder), make_home(tmp_path / "providers", models_folder)

    with golem.devnet(tmp_path, providers, golem.scenario(tmp_path, 3, {})) as variables:
        found = golem.kill(tmp_path, home, variables, 4, seed=20)

    assert found == {
        "kills": 4,
        "requests": 32,
        "lost": 0,
        "answered twice": 0,
        "agreements left open": 0,
        "demands left open": 0,
        "allocations left open": 0,
    }


def test_up_rents_a_computer_and_the_answer_names_provider_and_cost(tmp_path: Path, models_folder: Path) -> None:
    home, providers = make_home(tmp_path / "home", models_folder), make_home(tmp_path / "providers", models_folder)
    plan = golem.scenario(tmp_path, 2, {})
    late = '[[providers.faults]]\nkind = "late-bill"\nseconds = 3\n'
    plan.write_text("[[providers]]".join(part and part + late for part in plan.read_text().split("[[providers]]")))

    with golem.devnet(tmp_path, providers, plan) as variables:
        # It ends only when the bill is paid, which comes late.
        system = System(home, "--executor", "golem", **variables, MLG_GOLEM_SETTLE_SECONDS="300")
        try:
            id = system.post(make_image())["req_id"]
            # The cost is recorded after the answer, so that nobody waits for it.
            wait_until(lambda: "cost" in system.answer(id))
            estimated = system.answer(id)
        finally:
            system.stop()
        assert_nothing_is_open(variables)
        daemons = paid_by_the_daemon(variables)
    show = processes.mlg("requests", "show", id, "--json", "--home", str(home))
    settled = json.loads(subprocess.run(show, capture_output=True, text=True, check=True).stdout)

    assert (estimated["status"], len(estimated["preds"]), estimated["cost_is_final"]) == ("done", 5, False)
    assert estimated["provider"] in PROVIDER_NAMES[:2]
    assert (Decimal(settled["cost"]), settled["cost_is_final"]) == (daemons, True)
