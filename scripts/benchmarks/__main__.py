"""The table of measurements: `python -m scripts.benchmarks NAME [OPTION ...]`."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "uploads",
    "drain",
    "chunk",
    "backlog",
    "start",
    "door",
    "scale",
    "shrink",
    "models",
    "overlap",
    "golem",
    "operator",
    "streams",
)


def main() -> int:
    """Run the measurement that is named first."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(f"Usage: scripts/bench {'|'.join(NAMES)} [--help]", file=sys.stderr)
        return 2
    name = sys.argv.pop(1)
    importlib.import_module(f"scripts.benchmarks.{name}").main()
    return 0


sys.exit(main())
