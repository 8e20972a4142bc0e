"""The benchmarks: where each is, and how it is run for the page that `scripts/bench all` writes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True, kw_only=True)
class Run:
    """A benchmark, and how it is run for the page."""

    #: The folder of its module, which has its name.
    folder: str
    #: Options that make it shorter, as one writes them.
    options: str = ""
    #: See `Section` in `support/page.py`.
    column: str | None = None


#: In the order of the page.
RUNS = {
    "peers": Run(folder="execution", options="--images 300 --rounds 3"),
    "drain": Run(folder="execution", options="--images 600"),
    "uploads": Run(folder="serving", options="--rounds 3 --seconds 2"),
    "scale": Run(folder="serving", options="--times 15"),
    "dashboard": Run(folder="serving", options="--requests 50000 --times 50 --depths 0,1000,49000", column="median ms"),
    "backlog": Run(folder="serving"),
    "commits": Run(folder="serving", options="--requests 100000 --webhooks 20000 --purged 20000"),
    "retention": Run(folder="serving", options="--requests 100000 --webhooks 20000 --purged 20000"),
    "slow_clients": Run(folder="serving", options="--seconds 2"),
    "chunk": Run(folder="execution", options="--rounds 5"),
    "resizing": Run(folder="models", options="--rounds 15"),
    "precision": Run(folder="models", options="--photos 400 --surer-than 0.5"),
    "workers": Run(folder="execution", options="--chunks 10"),
    "gpu": Run(folder="execution"),
    "startup": Run(folder="execution", options="--rounds 3"),
    "models": Run(folder="models", options="--models resnet50,nasnet_mobile --rounds 1 --judged 0", column="net times"),
    "collections": Run(folder="models", options="--vectors 100000 --crops 0 --images 200"),
    "training": Run(folder="models", options="--images 200"),
    "heads": Run(folder="models", options="--rounds 3"),
    "style": Run(folder="models", options="--rounds 1"),
    "faces": Run(folder="models", options="--photos 100 --rounds 3"),
    "golem": Run(folder="execution", options="--images 200 --providers 2 --rounds 1 --kills 2"),
    "sessions": Run(folder="execution", options="--sessions 2 --images 200 --providers 4"),
    "telegram": Run(folder="serving", options="--chats 1000 --sent 50 --single 20"),
}


def import_benchmark(name: str) -> ModuleType:
    """Import the module of a benchmark. :raises KeyError: there is none of that name."""
    return importlib.import_module(f"scripts.benchmarks.{RUNS[name].folder}.{name}")
