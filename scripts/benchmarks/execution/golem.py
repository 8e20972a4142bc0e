"""Benchmark of the golem executor on a devnet: throughput compared with the local executor, time to the first result,
time to the end, and the effect of faulty providers and of killed batchers.

Everything runs as a user runs it: `mlg devnet` in one process, `mlg batch` in another, with a shared home.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import resource
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import click

from batcher.settings import SHRINK_CHOICES
from scripts.benchmarks.models.keras_models import artefact_of
from scripts.benchmarks.support import photos, processes
from scripts.benchmarks.support.measuring import in_turns, medians, print_table, rounds_option, work_folder
from scripts.benchmarks.support.stored_requests import add_images

#: From linux/prctl.h.
_PR_SET_CHILD_SUBREAPER = 36
#: Provider -> fault: three of eight providers are faulty.
FAULTS = {"gamma": "garbage", "epsilon": "die", "eta": "hang"}
#: Kind of run -> executor, faults of the providers.
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "local": ("local", {}),
    "golem, no faults": ("golem", {}),
    "golem, 3 of 8 faulty": ("golem", FAULTS),
}


class BatchRun(NamedTuple):
    """The measurements of one `mlg batch --once`, from the start of its process if nothing else is said."""

    #: Images per second to the last result, and from the first to the last one.
    rate: float
    steady_rate: float
    first_seconds: float
    last_seconds: float
    #: From the last result to the end of the process.
    closing_seconds: float
    #: Processor time in milliseconds an image, starts of programs included: of the batcher and what it starts, of the
    #: devnet itself, which is no part of a real network, and of the providers' programs. Other work on the machine
    #: changes it less than the rates.
    requestor_cpu: float
    devnet_cpu: float
    provider_cpu: float
    #: GLM paid.
    cost: Decimal


def scenario(folder: Path, providers: int, faults: dict[str, str], *, latency: float = 0.0, rate: float = 0.0) -> Path:
    """Write a scenario file: providers with equal prices and one core each, some with a fault after two occasions.

    :param latency: seconds before each answer of a provider.
    :param rate: of its transfers, in bytes a second; 0 is unlimited.
    """
    from devnet.scenario import PROVIDER_NAMES

    text = ""
    for name in PROVIDER_NAMES[:providers]:
        text += f'[[providers]]\nname = "{name}"\nstart_price = 0.001\nprice_per_second = 0.00002\n'
        text += f"price_per_cpu_second = 0.00008\nlatency_seconds = {latency}\nbytes_per_second = {rate}\n"
        if name in faults:
            text += f'[[providers.faults]]\nkind = "{faults[name]}"\nafter = 2\n'
    path = folder / "scenario.toml"
    path.write_text(text)
    return path


@contextlib.contextmanager
def devnet(folder: Path, home: Path, plan: Path) -> Iterator[dict[str, str]]:
    """Run a devnet during the block. :return: the environment variables that it prints."""
    with devnet_process(folder, home, plan) as (_, variables):
        yield variables


@contextlib.contextmanager
def devnet_process(folder: Path, home: Path, plan: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Run a devnet during the block. :return: its pid, and the environment variables that it prints."""
    variables = folder / f"devnet-{time.monotonic_ns()}.env"
    command = processes.mlg("devnet", "--scenario", str(plan), "--home", str(home), "--env-file", str(variables))
    with processes.running(command, folder / "devnet.log", variables.exists) as pid:
        shell = f". {variables}; env -0"
        printed = subprocess.run(["sh", "-c", shell], capture_output=True, check=True).stdout
        found = dict(line.split("=", 1) for line in os.fsdecode(printed).split("\0") if "=" in line)
        yield (
            pid,
            {
                name: found[name]
                for name in ("YAGNA_APPKEY", "YAGNA_API_URL", "YAGNA_SUBNET", "MLG_GOLEM_IMAGE", "PATH")
            },
        )


def query(home: Path, sql: str) -> list[Any]:
    """Read from the database of a home."""
    with contextlib.closing(sqlite3.connect(f"file:{home / 'mlg.db'}?mode=ro", uri=True)) as database:
        return database.execute(sql).fetchall()


def adopt_orphans() -> None:
    """Become the parent of processes that children of this one leave behind, so that their time can be counted."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reaped_seconds() -> float:
    """Return the processor time of all processes that have ended and were waited for; waits for orphans."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def own_seconds(pid: int) -> float:
    """Return the processor time of a running process, without that of its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed_run(command: list[str], **options: Any) -> tuple[int, float]:
    """Run a program. :return: its exit status, and the processor time of it and the children that it waited for."""
    process = subprocess.Popen(command, **options)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def batch(home: Path, executor: str, log: Path, **variables: str) -> BatchRun:
    """Run `mlg batch --once` on a home with requests, and read the measurements from its store.

    The processor time is that of the batcher alone; `main` adds that of the devnet and the providers, and the cost.
    """
    command = processes.mlg("batch", "--once", "--executor", executor, "--home", str(home))
    started = time.time()
    with log.open("ab") as output:
        status, cpu = timed_run(command, stdout=output, stderr=output, env={**os.environ, **variables})
    ended = time.time()
    ((total,),) = query(home, "SELECT count(*) FROM requests")
    answered = query(home, "SELECT finished_at FROM requests WHERE state = 'done'")
    if status or len(answered) < total:
        raise RuntimeError(f"{len(answered)} of {total} finished:\n{log.read_text()[-3000:]}")
    times = [datetime.fromisoformat(text).timestamp() - started for (text,) in answered]
    first, last = min(times), max(times)
    return BatchRun(
        rate=total / last,
        steady_rate=total / max(1e-9, last - first),
        first_seconds=first,
        last_seconds=last,
        closing_seconds=ended - started - last,
        requestor_cpu=1000 * cpu / total,
        devnet_cpu=0.0,
        provider_cpu=0.0,
        cost=Decimal(0),
    )


def paid(home: Path) -> Decimal:
    """Return what all work of a home has cost."""
    costs = subprocess.run(
        processes.mlg("costs", "--json", "--home", str(home)), capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in costs.stdout.splitlines()]
    return Decimal(next(row["paid"] for row in rows if row["by"] == "total"))


def query_daemon(variables: dict[str, str], path: str) -> Any:
    """Return the JSON response of a GET call of the daemon."""
    request = urllib.request.Request(
        variables["YAGNA_API_URL"] + path, headers={"Authorization": f"Bearer {variables['YAGNA_APPKEY']}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def kill(folder: Path, home: Path, variables: dict[str, str], kills: int, seed: int) -> dict[str, int]:
    """Kill batchers at random times, let one finish, and count lost requests, duplicate answers and open agreements."""
    generator = random.Random(seed)
    base = photos.photo_jpegs()
    command = processes.mlg("batch", "--executor", "golem", "--every", "0.5", "--home", str(home))
    for turn in range(kills):
        add_images(home, photos.variants(base[:1], 8, 1_000_000 + turn * 8))
        with (folder / "killed.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **variables, "MLG_LEASE_SECONDS": "2"}
            )
        time.sleep(generator.uniform(0.2, 6.0))
        process.kill()
        process.wait()
    time.sleep(2.5)  # the last lease expires
    batch(home, "golem", folder / "batch.log", **variables, MLG_LEASE_SECONDS="2")
    ((lost, done),) = query(home, "SELECT coalesce(sum(state != 'done'), 0), sum(state = 'done') FROM requests")
    ((answers,),) = query(home, "SELECT coalesce(sum(answers), 0) FROM chunks")
    # One whose batcher was killed before it recorded it is only released when it is two minutes old.
    recorded = {id for (id,) in query(home, "SELECT id FROM allocations")}
    allocations = [each["allocationId"] for each in query_daemon(variables, "/payment-api/v1/allocations")]
    return {
        "kills": kills,
        "requests": done + lost,
        "lost": lost,
        "answered twice": answers - done,
        "agreements left open": len(query_daemon(variables, "/market-api/v1/agreements?state=Approved")),
        "demands left open": len(query_daemon(variables, "/market-api/v1/demands")),
        "allocations left open": len(recorded.intersection(allocations)),
    }


@click.command()
@click.option("--images", "count", default=2000, show_default=True, help="Number of images.")
@click.option("--providers", default=8, show_default=True, help="Number of providers with one core each.")
@click.option("--model", default="efficientnet_lite0", show_default=True, help="A Keras model gets seeded weights.")
@click.option("--shrink", type=click.Choice(SHRINK_CHOICES), default="auto", show_default=True, help="For golem.")
@click.option("--latency", default=0.0, show_default=True, help="Seconds before each answer of a provider.")
@click.option(
    "--bytes-per-second", "rate", default=0.0, show_default=True, help="Of a provider's transfers; 0: no limit."
)
@rounds_option(3)
@click.option("--kills", default=50, show_default=True, help="Number of batchers to kill with SIGKILL.")
@click.option("--seed", default=1, show_default=True, help="Seed of the times of the kills.")
def main(
    count: int,
    providers: int,
    model: str,
    shrink: str,
    latency: float,
    rate: float,
    rounds: int,
    kills: int,
    seed: int,
) -> None:
    """Measure the golem executor on a devnet. Example: scripts/bench golem --images 500 --kills 5"""
    adopt_orphans()
    base, models = photos.photo_jpegs(), artefact_of(model).folder.parent
    settings = {"MLG_BUDGET_DAY": "100", "MLG_GOLEM_MAX_WORKERS": str(providers), "MLG_SHRINK": shrink}
    with work_folder() as folder:

        def make_home(name: str) -> Path:
            (folder / name).mkdir()
            (folder / name / "models").symlink_to(models)
            return folder / name

        def run(turn: int, kind: str) -> BatchRun:
            executor, faults = KINDS[kind]
            home, log = make_home(f"{kind} {turn}"), folder / "batch.log"
            add_images(home, photos.variants(base, count, turn * count), model)
            if executor == "local":
                return batch(home, executor, log)
            before = reaped_seconds()
            plan = scenario(folder, providers, faults, latency=latency, rate=rate)
            with devnet_process(folder, shared, plan) as (pid, variables):
                found = batch(home, executor, log, **variables, **settings, MLG_CHUNK_TIMEOUT_SECONDS="60")
                devnet_cpu = 1000 * own_seconds(pid) / count
            provider_cpu = 1000 * (reaped_seconds() - before) / count - found.requestor_cpu - devnet_cpu
            return found._replace(devnet_cpu=devnet_cpu, provider_cpu=provider_cpu, cost=paid(home))

        shared = make_home("providers")
        if count and rounds:
            runs = in_turns(rounds, {kind: lambda turn, kind=kind: run(turn, kind) for kind in KINDS})  # type: ignore
            _print_runs(runs, f"{count} JPEGs of 113 KB, 800 x 600, {model}, resizing {shrink}; medians of {rounds}")
        if kills:
            with devnet(folder, shared, scenario(folder, providers, {})) as variables:
                found = kill(folder, make_home("kills"), {**variables, **settings}, kills, seed)
            click.echo(", ".join(f"{name} {value}" for name, value in found.items()))


def _print_runs(runs: dict[str, list[BatchRun]], title: str) -> None:
    rows = []
    for kind, each in runs.items():
        rate, steady, first, _, closing, *cpu, cost = medians(each)
        figures = (rate, steady, first, closing, *cpu)
        rows.append([kind, *(f"{figure:.1f}" for figure in figures), f"{cost:.6f}"])
    head = (
        "executor",
        "images/s",
        "from the first result on",
        "first result s",
        "last result to end s",
        "CPU ms/image: batcher",
        "devnet",
        "providers",
        "GLM",
    )
    print_table(title, head, rows)
    local, no_faults, faulty = runs.values()
    rates = [(a.rate / b.rate, a.steady_rate / b.steady_rate) for a, b in zip(no_faults, local, strict=True)]
    prices = [(a.last_seconds / b.last_seconds, a.cost / b.cost) for a, b in zip(faulty, no_faults, strict=True)]
    works = [
        ((a.requestor_cpu + a.provider_cpu) / b.requestor_cpu, a.devnet_cpu / b.requestor_cpu)
        for a, b in zip(no_faults, local, strict=True)
    ]
    (rate, steady), (seconds, cost), (work, simulator) = medians(rates), medians(prices), medians(works)
    click.echo(f"golem has {rate:.0%} of the local throughput, {steady:.0%} from the first result on")
    click.echo(f"golem takes {work:.2f} times the processor time, starts included, and the simulator {simulator:.2f}")
    click.echo(f"with faulty providers it takes {seconds:.2f} times as long and costs {cost:.2f} times as much")
