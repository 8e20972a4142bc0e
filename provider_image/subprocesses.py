"""Child processes that run this project's own modules: their command, their environment, and how they ended.

Used by `mlg up` for `mlg serve` and `mlg batch`, by the local executor for its workers, and by
`provider_image.decoders`.
Works installed and from a source checkout, whatever the current folder is and contains.
"""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from provider_image.environment import without_secrets

#: The folder that contains the packages and mlg.py.
_ROOT = Path(__file__).resolve().parents[1]


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this Python.

    -P keeps the current folder out of the import path: it may contain another package named `server`.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(variables: Mapping[str, str], *, has_secrets: bool = False) -> dict[str, str]:
    """Return these variables, with which a child finds this project's packages too.

    :param has_secrets: with the keys of the Golem daemon and of accounts. A child that decodes images or answers HTTP
        requests gets none: the bytes of a stranger may take control of it.
    """
    variables = dict(variables) if has_secrets else without_secrets(variables)
    # Installed packages are found without it; site-packages in PYTHONPATH would go before the standard library.
    if Path(sysconfig.get_paths()["purelib"]).resolve() == _ROOT:
        return variables
    folders = [variables.get("PYTHONPATH", ""), str(_ROOT)]
    return {**variables, "PYTHONPATH": os.pathsep.join(folder for folder in folders if folder)}


def exit_description(status: int) -> str:
    """Return how a process ended, as in "the process ended with status 3".

    :param status: its exit status; negative for a signal.
    """
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"was killed by {name}"
