"""The context that an executor is made from, for tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from batcher.executors import ExecutorContext


def make_context(work: Path, models: Path, *, store: Any = None, **variables: str) -> ExecutorContext:
    """Make a context. :param variables: added to the environment of the tests."""
    environment = {**os.environ, **variables}
    return ExecutorContext(owner=work.name, work=work, models=models, store=store, environment=environment)
