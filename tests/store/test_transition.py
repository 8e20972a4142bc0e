"""`transition` on SQLite: a process that is killed anywhere leaves all or nothing, and no other code sets a state."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from store.batches import BatchRecord
from store.rentals.ledger import BillState, InvoiceRecord
from store.requests import Answer, Claim
from store.settings import HomeSettings
from store.store import Store
from tests.contracts.history import CHUNK, DIGEST, MODELS, NOW, Driver, Facts, check_recount, read_facts
from tests.stores import open_store

ROOT = Path(__file__).parents[2]


@contextmanager
def opened(home: Path) -> Iterator[Store]:
    store = open_store(HomeSettings(home=home))
    yield store
    store.close()


def facts_of(home: Path) -> Facts:
    with opened(home) as store:
        return read_facts(store)


# Killed


def prepare(home: Path) -> None:
    """Leave a batch with two claimed and one queued request, a known answer, an endpoint and labels."""
    with opened(home) as store:
        driver = Driver(store)
        store.chunks.start(CHUNK)
        driver.add_endpoint(0)
        driver.add(7)
        driver.claim(1)
        driver.finish(0)
        store.chunks.finish(
            CHUNK.id, provider="p", bytes_received=1, seconds=1.0, done=1, failed=0, cost="0.1", code=None,
            reason=None, now=NOW, agreement_id="ag",
        )  # fmt: skip
        batch = BatchRecord(
            id="b", service="classification", model=MODELS[0], created_at=NOW, webhook="https://example.org/batch"
        )
        new = [driver.new(place, model=MODELS[0], digest=None, batch_id="b", id=f"r{place}") for place in range(3)]
        store.batches.add(batch, [(each, store.images.stage(b"x")) for each in new], [])
        store.requests.claim(
            models=MODELS[:1], limit=2, now=NOW, lease_ends_at=NOW + timedelta(seconds=30), oldest_before=None
        )


def claims_of(store: Store) -> list[Claim]:
    """The two claims of `prepare`."""
    found = [vars(store.requests.get(id)) for id in ("r0", "r1")]
    names = Claim.__dataclass_fields__.keys() - {"token"}
    return [Claim(token=1, **{name: values[name] for name in names}) for values in found]


def answers_of(store: Store) -> list[Answer]:
    """Answers for the two claims of `prepare`."""
    return [
        Answer(claim=claim, output=["x"], digest=DIGEST, chunk_id="c", provider="p", seconds=0.1)
        for claim in claims_of(store)
    ]


def end_batch(store: Store) -> None:
    """End the batch: its queued request is cancelled first, in a commit of its own."""
    store.requests.cancel("r2", now=NOW)
    store.requests.finish(answers_of(store), now=NOW)


def pay(store: Store) -> None:
    """Accept the bill of the chunk of `prepare`."""
    invoice = InvoiceRecord(
        id="i", agreement_id="ag", amount=Decimal(1), state=BillState.ACCEPTED, received_at=NOW, settled_at=NOW
    )
    store.ledger.record_invoice(invoice)


def add_known(store: Store) -> None:
    """Add a batch whose images were answered before."""
    driver = Driver(store)
    batch = BatchRecord(id="known", service="classification", model=MODELS[1], created_at=NOW)
    items = [(driver.new(7, batch_id="known"), store.images.stage(b"1")) for _ in range(2)]
    store.batches.add(batch, items, [])


#: What is killed, by name.
KILLED: dict[str, Callable[[Store], object]] = {
    "claim": lambda store: store.requests.claim(
        models=MODELS, limit=9, now=NOW, lease_ends_at=NOW + timedelta(seconds=30), oldest_before=None
    ),
    "add": add_known,
    "end_batch": end_batch,
    "fail": lambda store: store.requests.fail(claims_of(store), code="x", reason="y", now=NOW),
    "release": lambda store: store.requests.release_expired(NOW + timedelta(seconds=31)),
    "cancel": lambda store: store.batches.cancel("b", now=NOW),
    "pay": pay,
}


def kill_at_each_statement(name: str, prepared: Path, homes: Path) -> None:
    """Do the same on copies of a home, in processes that are killed before their first, second, ... statement.

    The last one has no such statement, and is not killed.
    """
    for position in range(1, 1000):
        home = homes / f"{position:03d}"
        shutil.copytree(prepared, home)
        pid = os.fork()
        if pid == 0:
            left = position

            def count(statement: str) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            store = Store(HomeSettings(home=home))
            store.database.write(lambda transaction: transaction.connection.set_trace_callback(count))
            KILLED[name](store)
            os._exit(0)
        if os.waitpid(pid, 0)[1] == 0:
            return


@pytest.mark.parametrize("name", KILLED)
def test_a_process_that_is_killed_at_any_statement_leaves_all_or_nothing(tmp_path: Path, name: str) -> None:
    prepared, homes = tmp_path / "prepared", tmp_path / "homes"
    prepare(prepared)
    before = facts_of(prepared)
    code = (
        "import sys; from pathlib import Path; from tests.store.test_transition import kill_at_each_statement;"
        "kill_at_each_statement(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))"
    )

    subprocess.run([sys.executable, "-c", code, name, str(prepared), str(homes)], cwd=ROOT, check=True, timeout=300)

    found = [facts_of(home) for home in sorted(homes.iterdir())]
    for facts in found:
        check_recount(facts)
    assert len(found) > 8
    assert found[0] == before
    assert found[-1].changes[: len(before.changes)] == before.changes
    assert len({str(facts.requests) for facts in found[:-1]}) == (2 if name == "end_batch" else 1)
    assert found[-1] != found[-2]


# The source


def strings(path: Path) -> Iterator[str]:
    """Every text in a module; an f-string with its fields left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_no_statement_elsewhere_sets_a_state() -> None:
    sets_state = re.compile(r"\bUPDATE\s+requests\s+SET\b(?:(?!\bWHERE\b).)*?(\bstate\s*=|\{\})", re.DOTALL)
    modules = [path for package in ("store", "server", "batcher", "cli") for path in (ROOT / package).rglob("*.py")]

    setting = [path.name for path in modules for text in strings(path) if sets_state.search(text)]
    adding = [path.name for path in modules if re.search(r"INTO\s+requests\b|insert_sql\(.requests", path.read_text())]
    deleting = [
        path.name for path in modules for text in strings(path) if re.search(r"DELETE\s+FROM\s+requests\b", text)
    ]

    assert set(setting) == {"transition.py"}
    assert adding == ["requests.py"]
    assert set(deleting) == {"requests.py"}
