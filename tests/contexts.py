"""The context that an executor is made from, for tests."""

from __future__ import annotations

import os
from pathlib import Path

from batcher.executors import ExecutorContext
from store.settings import HomeSettings
from store.store import Store


def make_context(work: Path, models: Path, *, store: Store | None = None, **variables: str) -> ExecutorContext:
    """Make a context.

    :param store: by default one that cannot be used, for executors that cost nothing or are not started.
    :param variables: added to the environment of the tests.
    """
    environment = {**os.environ, **variables}
    store = Store(HomeSettings(home=work / "nowhere")) if store is None else store
    return ExecutorContext(owner=work.name, work=work, models=models, store=store, environment=environment)
