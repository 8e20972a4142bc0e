"""A process that claims a training like `trainer` does, and then does what the training's name says."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import UTC, datetime

from store.settings import HomeSettings
from store.store import Store

store = Store(HomeSettings.from_env(os.environ))
training = store.trainings.claim(sys.argv[1], now=datetime.now(UTC))
assert training is not None
if training.name == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if training.name == "slow":
    store.trainings.set_step(training, str(os.getpid()))
    time.sleep(600)
store.trainings.finish(training, digest="d" * 64, figures={}, files={}, now=datetime.now(UTC))
