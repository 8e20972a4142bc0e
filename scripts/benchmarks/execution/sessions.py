"""Batchers in a row on one devnet with random faults, some of them killed: does the ledger agree with the daemon?

All that a user can lose is compared at the end: images without a result, amounts paid twice or after a refusal, budgets
that were passed, agreements, demands and allocations that are still open.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
import urllib.parse
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import click

from scripts.benchmarks.execution import golem
from scripts.benchmarks.models.keras_models import artefact_of
from scripts.benchmarks.support import photos, processes
from scripts.benchmarks.support.measuring import work_folder
from scripts.benchmarks.support.stored_requests import add_images

#: Faults of providers, each with the further fields of its table.
PROVIDER_FAULTS = {
    "no-answer": "every = 3",
    "reject": "every = 2",
    "slow-approval": "seconds = 2",
    "drop-agreement": "seconds = 1\nevery = 4",
    "no-activity": "every = 3",
    "overbill": "factor = 1.9\nevery = 2",
    "late-bill": "seconds = 6",
    "never-bill": "every = 5",
    "payable-debit-note": "every = 3",
    "frequent-debit-notes": "seconds = 0.5",
    "fail-deploy": "every = 3",
    "exit-nonzero": "every = 6",
    "garbage": "every = 5",
    "truncate": "every = 6",
    "wrong-digest": "every = 7",
    "swap-results": "every = 5",
    "die": "every = 6",
    "vanish-http": "every = 9",
}
#: Faults of the daemon.
DAEMON_FAULTS = (
    ("http-500", "GET /payment-api/v1/invoiceEvents", "every = 7"),
    ("http-500", "POST /payment-api/v1/invoices/*/accept", "every = 4"),
    ("gone", "POST /payment-api/v1/invoices/*/accept", "every = 5"),
    ("http-500", "GET /payment-api/v1/debitNotes/*", "every = 5"),
    ("http-500", "POST /activity-api/v1/activity/*/exec", "every = 19"),
    ("gone", "POST /market-api/v1/agreements/*/terminate", "every = 6"),
)
#: What a chunk and a start may take, so that hanging providers do not make the sessions long.
SETTINGS = {
    "MLG_BUDGET_DAY": "1",
    "MLG_CHUNK_TIMEOUT_SECONDS": "30",
    "MLG_GOLEM_BAN_SECONDS": "5",
    "MLG_GOLEM_IDLE_SECONDS": "5",
    "MLG_GOLEM_MAX_WORKERS": "3",
    "MLG_GOLEM_RENTAL_SECONDS": "60",
    "MLG_LEASE_SECONDS": "3",
    "MLG_GOLEM_SETTLE_SECONDS": "20",
}


def write_scenario(path: Path, generator: random.Random, providers: int) -> Path:
    """Write a scenario in which most providers have two random faults and the daemon has some."""
    from devnet.scenario import PROVIDER_NAMES

    text = ""
    for kind, call, occasions in DAEMON_FAULTS:
        text += f'[[faults]]\nkind = "{kind}"\npath = "{call}"\nafter = {generator.randint(1, 5)}\n{occasions}\n'
    for number, name in enumerate(PROVIDER_NAMES[:providers]):
        # Two are without a fault, so that every image can be answered; they cost more, so that the others are used too.
        price = 0.00002 if number >= 2 else 0.00004
        text += f'[[providers]]\nname = "{name}"\nstart_price = 0.001\nprice_per_second = {price:.5f}\nspeed = 0.08\n'
        for kind in generator.sample(sorted(PROVIDER_FAULTS), 2 if number >= 2 else 0):
            text += f'[[providers.faults]]\nkind = "{kind}"\n{PROVIDER_FAULTS[kind]}\n'
    path.write_text(text)
    return path


def run_session(home: Path, log: Path, variables: Mapping[str, str], *, kill_after_seconds: float | None) -> None:
    """Run a batcher until all requests have ended, or kill it."""
    environment = {**os.environ, **variables}
    words = ("batch", "--executor", "golem", "--home", str(home))
    with log.open("ab") as output:
        if kill_after_seconds is None:
            command = processes.mlg(*words, "--once")
            subprocess.run(command, stdout=output, stderr=output, env=environment, check=True)
            return
        process = subprocess.Popen(
            processes.mlg(*words, "--every", "0.5"), stdout=output, stderr=output, env=environment
        )
        time.sleep(kill_after_seconds)
        process.kill()
        process.wait()


def all_invoices(variables: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Fetch all invoices that a daemon has, page by page. :return: id -> invoice."""
    found: dict[str, dict[str, str]] = {}
    path = "/payment-api/v1/invoices?maxItems=100"
    after = ""
    while page := golem.query_daemon(dict(variables), path + after):
        found |= {each["invoiceId"]: each for each in page}
        after = "&afterTimestamp=" + urllib.parse.quote(max(each["timestamp"] for each in page))
    return found


def compare(home: Path, variables: Mapping[str, str]) -> dict[str, object]:
    """Compare the ledger of a home with the daemon that it was used with."""
    ledger = {
        id: (state, Decimal(amount))
        for id, state, amount in golem.query(home, "SELECT id, state, amount FROM invoices")
    }
    invoices = all_invoices(variables)
    paid = {id for id, each in invoices.items() if each["status"] in ("ACCEPTED", "SETTLED")}
    accepted = {id for id, (state, _) in ledger.items() if state == "accepted"}
    cap = Decimal(SETTINGS["MLG_BUDGET_DAY"])
    sum_of_ledger = sum((ledger[id][1] for id in accepted), Decimal(0))
    sum_of_daemon = sum((Decimal(invoices[id]["amount"]) for id in paid), Decimal(0))
    states = dict(golem.query(home, "SELECT state, count(*) FROM requests GROUP BY state"))
    ((answers,),) = golem.query(home, "SELECT coalesce(sum(answers), 0) FROM chunks")
    return {
        "requests by state": states,
        "answered twice": answers - states.get("done", 0),
        "invoices": len(invoices),
        "refused": sum(state == "refused" for state, _ in ledger.values()),
        "refused but paid": len(paid - accepted),
        "accepted but unpaid": len(accepted - paid),
        "paid by the ledger": sum_of_ledger,
        "paid by the daemon": sum_of_daemon,
        "above the budget": max(Decimal(0), sum_of_daemon - cap),
        "agreements left open": len(golem.query_daemon(dict(variables), "/market-api/v1/agreements?state=Approved")),
        "demands left open": len(golem.query_daemon(dict(variables), "/market-api/v1/demands")),
        "allocations left open": len(golem.query_daemon(dict(variables), "/payment-api/v1/allocations")),
    }


@click.command()
@click.option("--sessions", default=10, show_default=True, help="Number of batchers in a row.")
@click.option("--images", "count", default=2000, show_default=True, help="Number of images of all sessions.")
@click.option("--providers", default=8, show_default=True, help="Number of providers, most of them with faults.")
@click.option("--seed", default=1, show_default=True, help="Seed of the faults and of the kills.")
def main(sessions: int, count: int, providers: int, seed: int) -> None:
    """Compare ledger and daemon after faults and kills. Example: scripts/bench sessions --sessions 3 --images 100"""
    generator = random.Random(seed)
    base, models = photos.photo_jpegs()[:1], artefact_of("efficientnet_lite0").folder.parent
    with work_folder() as folder:
        for name in ("home", "providers"):
            (folder / name).mkdir()
            (folder / name / "models").symlink_to(models)
        home, plan = folder / "home", write_scenario(folder / "scenario.toml", generator, providers)
        with golem.devnet(folder, folder / "providers", plan) as variables:
            environment = {**variables, **SETTINGS}
            for session in range(sessions):
                first, end = session * count // sessions, (session + 1) * count // sessions
                add_images(home, photos.variants(base, end - first, first))
                is_killed = session % 2 == 0 and session < sessions - 1
                started = time.monotonic()
                run_session(
                    home,
                    folder / "batch.log",
                    environment,
                    kill_after_seconds=generator.uniform(2, 90) if is_killed else None,
                )
                how = "killed" if is_killed else "ended"
                click.echo(f"session {session + 1} of {sessions} {how} after {time.monotonic() - started:.0f} s")
            renewals = (folder / "batch.log").read_text().count(" is renewed")
            click.echo(f"renewals of a demand: {renewals}")
            for name, value in compare(home, variables).items():
                click.echo(f"{name}: {value}")
