"""The command of the benchmarks: `python -m scripts.benchmarks NAME [OPTION ...]`."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "backlog",
    "chunk",
    "dashboard",
    "decode_overlap",
    "drain",
    "golem",
    "models",
    "reduced_scale",
    "resize",
    "sse",
    "startup",
    "upload_checks",
    "uploads",
)


def main() -> int:
    """Run the benchmark that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(f"Usage: scripts/bench {'|'.join(NAMES)} [--help]", file=sys.stderr)
        return 2
    name = sys.argv.pop(1)
    importlib.import_module(f"scripts.benchmarks.{name}").main()
    return 0


sys.exit(main())
