"""What a request costs as quantities grow: queue, kept requests, models, keys, items of a batch, workers, pipelines.

One figure for each power of ten. Times of the store are milliseconds of processor time, which other work on the machine
changes little; those of pages are milliseconds by the clock. Each size is measured in a process of its own, whose peak
memory is shown. Where a figure grows, docs/measurements.md says why.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import httpx

from batcher.pipelines import PipelineRunner
from provider_image.compiler import ensure_installed
from provider_image.models.registry import list_rows
from scripts.benchmarks.support import processes, stored_requests
from scripts.benchmarks.support.measuring import milliseconds, print_table, timed, work_folder
from store import new_id
from store.batches import BatchRecord
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.processes.batchers import BatcherRecord
from store.requests import Answer, Claim, NewRequest
from store.search import Query
from store.states import RequestState
from store.store import Store

ITEMS = stored_requests.ITEMS
#: Models among which requests are divided, where nothing else is said.
MODELS = 6
#: Requests that wait, where nothing else is said.
WAITING = 20_000
#: From the middle, those whose steps exist.
_SOME_PIPELINES = """
    SELECT id FROM requests WHERE service = 'pipeline' AND state = :state AND number % 20 != 0
      AND number > (SELECT max(number) / 2 FROM requests) LIMIT :limit
"""
#: Name -> milliseconds, or megabytes.
Figures = dict[str, float]


def tens(last: int, first: int = 1) -> list[int]:
    """List the powers of ten from `first`, which is one, to `last`, which is listed too."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 10
    return [*sizes, last]


def processor_ms(work: Callable[[], object], times: int) -> float:
    """Return the median of the processor time of calls, in milliseconds."""
    seen = []
    for _ in range(times):
        started = time.process_time()
        work()
        seen.append(1000 * (time.process_time() - started))
    return statistics.median(seen)


def measure_store(home: Path, times: int, key_ids: Sequence[str]) -> Figures:
    """Measure what a server and a batcher do with the store for each request.

    :param key_ids: API keys that requests are added with; empty for none.
    """
    found: Figures = {}
    with stored_requests.opened(home) as store:
        models = [row["model"] for row in store.database.rows("SELECT model FROM open_requests WHERE count > 0")]
        names = iter(range(10**9))
        last_id = ""

        def add() -> None:
            nonlocal last_id
            number = next(names)
            new = NewRequest(
                id=new_id(),
                service="classification",
                model=models[number % len(models)] if models else "model_0",
                key_id=key_ids[number % len(key_ids)] if key_ids else None,
                created_at=datetime.now(UTC),
            )
            last_id = store.requests.add(new, store.images.stage(f"{new.id}".encode())).id

        found["add"] = processor_ms(add, times)
        found["read"] = processor_ms(lambda: store.requests.get(last_id), times)
        found["count the queue"] = processor_ms(store.requests.backlog, times)
        found["list 50"] = processor_ms(lambda: store.requests.list(limit=50), times)
        models = models or ["model_0"]
        claims: list[Claim] = []

        def claim() -> None:
            now = datetime.now(UTC)
            claims[:] = store.requests.claim(
                models=models, limit=ITEMS, now=now, lease_ends_at=now + timedelta(seconds=30), oldest_before=now
            )
            if not claims:
                raise RuntimeError("there is nothing to claim")

        def renew() -> None:
            store.requests.renew(claims, lease_ends_at=datetime.now(UTC) + timedelta(seconds=60))

        def finish() -> None:
            answers = [
                Answer(
                    claim=each, output=[["n", "label", 0.5]], digest="d" * 64, chunk_id="c", provider="p", seconds=0.02
                )
                for each in claims
            ]
            store.requests.finish(answers, now=datetime.now(UTC))

        seen: dict[str, list[float]] = {f"claim {ITEMS}": [], f"renew {ITEMS}": [], f"answer {ITEMS}": []}
        for _ in range(max(3, times // 3)):
            for name, work in zip(seen, (claim, renew, finish), strict=True):
                seen[name].append(processor_ms(work, 1))
        found |= {name: statistics.median(times_) for name, times_ in seen.items()}
    return found


def measure_batch(home: Path, times: int, items: int) -> Figures:
    """Measure a batch: for each of its items the adding, for the whole the reading of its progress."""
    added: list[str] = []
    with stored_requests.opened(home) as store:

        def add() -> None:
            now, id = datetime.now(UTC), new_id()
            batch = BatchRecord(id=id, service="classification", model="model_0", created_at=now)
            new = [
                NewRequest(id=new_id(), service="classification", model="model_0", created_at=now, batch_id=id)
                for _ in range(items)
            ]
            store.batches.add(batch, [(each, store.images.stage(each.id.encode())) for each in new], [])
            added.append(id)

        return {
            "add, each item": processor_ms(add, max(1, min(times, 2000 // items))) / items,
            "progress of the batch": processor_ms(lambda: store.batches.progress(added[-1]), times),
            "50 of its items": processor_ms(lambda: store.batches.items(added[-1], limit=50), times),
        }


def measure_pipelines(home: Path, times: int) -> Figures:
    """Measure what servers and batchers do with requests to pipelines, of which ten go on at a time."""
    with stored_requests.opened(home) as store:
        runner = PipelineRunner(store, home / "models", clock=lambda: datetime.now(UTC))
        now = datetime.now(UTC)
        ids = [id for (id,) in store.database.rows(_SOME_PIPELINES, {"state": "queued", "limit": times})]
        ended = [id for (id,) in store.database.rows(_SOME_PIPELINES, {"state": "done", "limit": times})]
        queued, done = iter(ids), iter(ended)
        long_ago = now - timedelta(days=9)
        found = {
            "find what goes on": processor_ms(lambda: store.pipelines.list_ready(now=now, limit=10), times),
            "let 10 go on": processor_ms(runner.run_ready, times),
            "count the queue": processor_ms(store.requests.backlog, times),
            "expire": processor_ms(lambda: store.requests.expire(now), times),
            "read": processor_ms(lambda: store.requests.get(ids[0]), times),
            "list 50": processor_ms(
                lambda: store.search.find(Query(model=stored_requests.PIPELINE_NAME), limit=50), times
            ),
            "received a minute": processor_ms(lambda: store.stats.count_accepted_before([long_ago, now]), times),
            "cancel": processor_ms(lambda: store.requests.cancel(next(queued), now=now), times),
            "delete": processor_ms(lambda: store.requests.remove(next(done)), times),
        }

        def claim_and_answer() -> None:
            claims = store.requests.claim(
                models=[stored_requests.STEP_MODEL],
                limit=ITEMS,
                now=now,
                lease_ends_at=now + timedelta(seconds=30),
                oldest_before=now,
            )
            answers = [
                Answer(claim=each, output={}, digest="d" * 64, chunk_id="c", provider="p", seconds=0.02)
                for each in claims
            ]
            store.requests.finish(answers, now=now)

        found[f"claim and answer {ITEMS} steps"] = processor_ms(claim_and_answer, times)
        return found


def measure_models(home: Path, times: int) -> Figures:
    """Measure the list of models, which pages and the batcher read."""
    models = home / "models"
    return {"list the models": processor_ms(lambda: list_rows(models), times)}


KINDS: Mapping[str, Callable[..., Figures]] = {
    "store": measure_store,
    "batch": measure_batch,
    "models": measure_models,
    "pipelines": measure_pipelines,
}


def in_own_process(kind: str, **arguments: Any) -> Figures:
    """Run one of KINDS in a process of its own. :return: its figures, and that process's peak memory."""
    text = json.dumps({"kind": kind, **arguments}, default=str)
    command = [sys.executable, "-m", "scripts.benchmarks", "scale", "--measure", text]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: Figures = json.loads(done.stdout)
    return found


def answer_child(text: str) -> None:
    """Do what `in_own_process` asks for, and print the figures."""
    arguments = json.loads(text)
    kind, home = KINDS[arguments.pop("kind")], Path(arguments.pop("home"))
    found = kind(home, **arguments)
    # Not `ru_maxrss`, which begins with that of the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    found["peak MB"] = int(peak[1]) / 1024
    click.echo(json.dumps(found))


def add_key(store: Store, name: str) -> tuple[str, str]:
    """Add an API key that may do everything. :return: its id, and the key."""
    id, key = make_key()
    store.keys.add(
        KeyRecord(id=id, name=name, sha256=hash_key(key), scopes=frozenset(Scope), created_at=datetime.now(UTC))
    )
    return id, key


def page_ms(folder: Path, home: Path, key: str, times: int) -> Figures:
    """Measure the home page of a server that requires API keys, the first time and then."""
    headers = {"Accept": "text/html", "Authorization": f"Bearer {key}"}
    with processes.serving_home(folder, home) as base, httpx.Client(base_url=base, timeout=120) as client:
        first, *others = milliseconds(
            lambda: client.get("/", headers=headers).raise_for_status(), times + 1, pause_seconds=0.1
        )
    return {"home page, first": first, "home page": statistics.median(others), "home page, longest": max(others)}


@contextlib.contextmanager
def new_home() -> Iterator[tuple[Path, Path]]:
    """Make a folder for logs, and in it a home."""
    with work_folder() as folder:
        yield folder, folder / "home"


def of_requests(state: RequestState, last: int, times: int) -> list[tuple[int, Figures]]:
    """Measure with more and more requests that are queued, or done."""
    rows = []
    with new_home() as (folder, home):
        with stored_requests.opened(home) as store:
            _, key = add_key(store, "key")
        if state.is_final:
            stored_requests.add_rows(home, WAITING, models=MODELS, state=RequestState.QUEUED)
        present = 0
        for size in tens(last, 1000):
            stored_requests.add_rows(home, size - present, models=MODELS, state=state)
            present = size
            rows.append(
                (size, in_own_process("store", home=home, times=times, key_ids=[]) | page_ms(folder, home, key, times))
            )
    return rows


def of_models(last: int, times: int) -> list[tuple[int, Figures]]:
    """Measure with more and more models, each with requests that wait and installed under a name of its own."""
    rows = []
    for size in tens(last):
        with new_home() as (folder, home):
            stored_requests.add_rows(home, WAITING, models=size, state=RequestState.QUEUED)
            with stored_requests.opened(home) as store:
                _, key = add_key(store, "key")
            install_copies(home / "models", size)
            found = in_own_process("store", home=home, times=times, key_ids=[])
            listed = in_own_process("models", home=home, times=times)
            del listed["peak MB"]
            rows.append((size, found | listed | page_ms(folder, home, key, times)))
    return rows


def install_copies(models: Path, count: int) -> None:
    """Install the starter model, and copies of it as models of a user's own."""
    original = ensure_installed(models, "efficientnet_lite0").folder
    facts = json.loads((original / "model.json").read_text())
    for number in range(count):
        copy = models / f"model_{number}"
        shutil.copytree(original, copy, copy_function=lambda source, target: Path(target).hardlink_to(source))
        (copy / "model.json").unlink()
        (copy / "model.json").write_text(json.dumps({**facts, "name": copy.name, "source": "own"}))


def of_keys(last: int, times: int) -> list[tuple[int, Figures]]:
    """Measure with more and more API keys, each of which has sent requests."""
    rows = []
    with new_home() as (folder, home):
        stored_requests.add_rows(home, WAITING, models=MODELS, state=RequestState.QUEUED)
        keys: list[tuple[str, str]] = []
        for size in tens(last):
            with stored_requests.opened(home) as store:
                keys += [add_key(store, f"key {number}") for number in range(len(keys), size)]
                store.database.execute(
                    "INSERT OR IGNORE INTO usage (day, key_id, model, client, accepted, done)"
                    " SELECT date('now'), id, 'model_0', 'other', 10, 10 FROM api_keys"
                )
            ids = [id for id, _ in keys]
            found = in_own_process("store", home=home, times=times, key_ids=ids[-100:])
            rows.append((size, found | page_ms(folder, home, keys[-1][1], times)))
    return rows


def of_batches(last: int, times: int) -> list[tuple[int, Figures]]:
    """Measure with more and more items in a batch."""
    rows = []
    for size in tens(last):
        with new_home() as (_, home):
            stored_requests.add_rows(home, WAITING, models=MODELS, state=RequestState.QUEUED)
            rows.append((size, in_own_process("batch", home=home, times=times, items=size)))
    return rows


def of_workers(last: int, times: int) -> list[tuple[int, Figures]]:
    """Measure with more and more workers, simulated: batchers that are alive, and ITEMS claims of each."""
    rows = []
    for size in tens(last):
        with new_home() as (folder, home):
            claims = size * ITEMS
            stored_requests.add_rows(home, claims + WAITING, models=MODELS, state=RequestState.QUEUED, claims=claims)
            now = datetime.now(UTC)
            with stored_requests.opened(home) as store:
                _, key = add_key(store, "key")
                for number in range(size):
                    store.batchers.heartbeat(
                        BatcherRecord(
                            id=f"b{number}",
                            host="host",
                            pid=number,
                            executor="local",
                            every_seconds=600,
                            max_wait_seconds=600,
                            capacity=1,
                            started_at=now,
                            seen_at=now,
                        )
                    )
            found = in_own_process("store", home=home, times=times, key_ids=[])
            rows.append((size, found | page_ms(folder, home, key, times)))
    return rows


def of_pipelines(last: int, times: int) -> list[tuple[int, Figures]]:
    """Measure with more and more requests to a pipeline, as `stored_requests.add_pipelines` makes them."""
    rows = []
    for size in tens(last, 10_000):
        with new_home() as (_, home):
            stored_requests.add_pipelines(home, size)
            rows.append((size, in_own_process("pipelines", home=home, times=times)))
    return rows


#: Name -> what is counted, the largest size by default, and how it is measured.
QUANTITIES: Mapping[str, tuple[str, int, Callable[[int, int], list[tuple[int, Figures]]]]] = {
    "queue": ("queued requests", 1_000_000, lambda last, times: of_requests(RequestState.QUEUED, last, times)),
    "kept": ("answered requests", 1_000_000, lambda last, times: of_requests(RequestState.DONE, last, times)),
    "models": ("models", 1000, of_models),
    "keys": ("API keys", 10_000, of_keys),
    "batch": ("items of a batch", 10_000, of_batches),
    "workers": ("workers", 1000, of_workers),
    "pipelines": ("requests to a pipeline", 1_000_000, of_pipelines),
}


def table_of(rows: Sequence[tuple[int, Figures]]) -> list[list[str]]:
    """Return the rows of a table, and one with how many times the last figure is the first."""
    lines = [[f"{size:,}", *(f"{value:.2f}" for value in found.values())] for size, found in rows]
    first, last = rows[0][1], rows[-1][1]
    return [*lines, ["last / first", *(f"{last[name] / first[name]:.2f}" if first[name] else "" for name in first)]]


@click.command()
@click.option("--of", "names", default=",".join(QUANTITIES), show_default=True, help="Which quantities grow.")
@click.option("--up-to", type=click.IntRange(min=1), help="The largest size, instead of each quantity's own.")
@click.option("--times", default=30, show_default=True, help="How often each thing is done; the median is shown.")
@click.option("--measure", hidden=True, help="What a process of this benchmark is asked for, JSON.")
def main(names: str, up_to: int | None, times: int, measure: str | None) -> None:
    """Measure what grows with what. Example: scripts/bench scale --of queue --up-to 10000000

    Ten million requests take about 6 GB of disk.
    """
    if measure is not None:
        answer_child(measure)
        return
    chosen = [name for name in names.split(",") if name]
    unknown = [name for name in chosen if name not in QUANTITIES]
    if unknown:
        raise click.BadParameter(f"there is no {unknown[0]}; there are: {', '.join(QUANTITIES)}", param_hint="--of")
    for name in chosen:
        what, largest, of = QUANTITIES[name]
        rows: list[tuple[int, Figures]] = []
        seconds = timed(lambda of=of, rows=rows, largest=largest: rows.extend(of(up_to or largest, times)))  # type: ignore[misc]
        title = f"Growing: {what} (milliseconds, and megabytes where it says so; took {seconds:.0f} s)"
        print_table(title, (what, *rows[0][1]), table_of(rows))
