"""The process of one training: `python -m trainer ID --parent PID`, started by `batcher/trainings.py`.

It has a low priority, limits, no network and no files but the home's, because it computes with what strangers sent, and
ends with its parent.
The exit status is 0 if the training has ended or belongs to another process; why it failed is in the store then.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from pathlib import Path

from provider_image.system_calls import confine, memory_limit_bytes
from store.settings import HomeSettings
from store.store import Store
from trainer.training import train

#: Most processor time of a training.
MAX_CPU_SECONDS = 3600
#: How much lower its priority is than that of server and workers.
_NICENESS = 10


def main() -> int:
    """Train."""
    logging.basicConfig(level=logging.INFO, format="trainer: %(message)s")
    parser = argparse.ArgumentParser(prog="python -m trainer")
    parser.add_argument("id")
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    settings = HomeSettings.from_env(os.environ)
    os.nice(_NICENESS)
    folders = [settings.home, settings.models, Path(tempfile.gettempdir())]
    for what, problem in confine(memory_limit_bytes(), MAX_CPU_SECONDS, (), folders).items():
        logging.getLogger(__name__).warning("%s cannot be taken from the process: %s", what, problem)
    if os.getppid() != arguments.parent:  # it ended before this process would have been told
        return 1
    with contextlib.closing(Store(settings)) as store:
        train(store, settings.models, arguments.id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
