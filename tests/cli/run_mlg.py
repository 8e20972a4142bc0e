"""Runs `mlg` as a user does, for the tests of commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.timing import DEADLINE_SECONDS

ROOT = Path(__file__).parents[2]


def mlg(*arguments: str, home: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    :param home: MLG_HOME.
    :param variables: further variables of its environment.
    """
    where = {} if home is None else {"MLG_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "mlg", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        env={**os.environ, **where, **variables},
    )
