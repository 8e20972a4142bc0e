"""The command of the benchmarks: `python -m scripts.benchmarks NAME [OPTION ...]`."""

from __future__ import annotations

import sys

from scripts.benchmarks.registry import RUNS, import_benchmark

if len(sys.argv) < 2 or sys.argv[1] not in ("all", *RUNS):
    print(f"Usage: scripts/bench {'|'.join(['all', *sorted(RUNS)])} [--help]", file=sys.stderr)
    sys.exit(2)
name = sys.argv.pop(1)
if name == "all":
    from scripts.benchmarks.all import main
else:
    main = import_benchmark(name).main
main()
