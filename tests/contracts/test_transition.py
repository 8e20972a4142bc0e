"""Contract of `transition`: whatever happens in whatever order, what follows from a change of state is there once."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contracts.conftest import OpenStore
from tests.contracts.history import ACTIONS, CHUNK, FREQUENT, IMPOSSIBLE, Driver, check_what_followed, read_facts


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_any_order_of_actions_writes_everything_once(open_store: OpenStore, seed: int) -> None:
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder))
        driver = Driver(store)
        store.chunks.start(CHUNK)
        before = read_facts(store)

        for _ in range(150):
            name = choose.choice([*ACTIONS, *FREQUENT])
            try:
                getattr(driver, name)(choose.randrange(100))
            except IMPOSSIBLE:
                continue

            after = read_facts(store)
            check_what_followed(before, after)
            assert len(after.labels) == sum(request["labels"] != "{}" for request in after.requests.values())
            before = after
        store.close()
