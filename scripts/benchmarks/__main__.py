"""The command of the benchmarks: `python -m scripts.benchmarks NAME [OPTION ...]`."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "all",
    "backlog",
    "chunk",
    "collections",
    "commits",
    "dashboard",
    "drain",
    "faces",
    "golem",
    "gpu",
    "heads",
    "models",
    "peers",
    "precision",
    "resizing",
    "retention",
    "scale",
    "sessions",
    "slow_clients",
    "startup",
    "style",
    "telegram",
    "training",
    "uploads",
    "workers",
)

if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
    print(f"Usage: scripts/bench {'|'.join(NAMES)} [--help]", file=sys.stderr)
    sys.exit(2)
name = sys.argv.pop(1)
importlib.import_module(f"scripts.benchmarks.{name}").main()
