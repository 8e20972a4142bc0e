"""How a child process that runs this project's own modules is started: its command and its environment.

Used by the supervisor for `mlg serve` and `mlg batch`, and by the local executor for its workers. Works installed and
from a source checkout, whatever the current folder is and whatever lies in it.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

#: The folder that holds provider_image, server, batcher and mlg.py.
_ROOT = Path(__file__).resolve().parents[1]


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this Python.

    -P keeps the current folder out of the import path: a user's folder may well hold a `server` of its own.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(variables: Mapping[str, str], extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment in which a child finds this project's packages.

    :param variables: the environment to start from.
    :param extra: set on top; its PYTHONPATH is put before the others.
    """
    environment = {**variables, **(extra or {})}
    folders = [(extra or {}).get("PYTHONPATH", ""), variables.get("PYTHONPATH", "")]
    # Installed packages are found anyway; naming site-packages here would put it before the standard library.
    if Path(sysconfig.get_paths()["purelib"]).resolve() != _ROOT:
        folders.insert(1, str(_ROOT))
    joined = os.pathsep.join(folder for folder in folders if folder)
    environment.pop("PYTHONPATH", None)
    return {**environment, "PYTHONPATH": joined} if joined else environment
