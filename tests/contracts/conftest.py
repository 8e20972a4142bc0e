"""The store of every backend. A second database is one more row of BACKENDS, and no new tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from store.settings import HomeSettings
from store.store import Store
from tests import stores

OpenStore = Callable[[Path], Store]


def open_sqlite(home: Path) -> Store:
    """Open the store of a home, which may be new."""
    return stores.open_store(HomeSettings(home=home))


#: Name -> opens the store of a home; several stores of one home see the same data.
BACKENDS: dict[str, OpenStore] = {"sqlite": open_sqlite}


@pytest.fixture(scope="session", params=BACKENDS)
def open_store(request: pytest.FixtureRequest) -> OpenStore:
    """Opens a store on a backend; the caller closes it."""
    return BACKENDS[request.param]


@pytest.fixture
def store(open_store: OpenStore, tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    store = open_store(tmp_path / "home")
    yield store
    store.close()
