"""The golem executor on a devnet: what it promises when everybody behaves."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.golem import golem, provider, scenario


def test_chunks_are_answered_and_every_coin_is_accounted_for(tmp_path: Path, models_folder: Path) -> None:
    async def main() -> None:
        async with golem(scenario(provider("alpha"), provider("beta")), tmp_path, models_folder) as bench:
            outcomes = await bench.run("one", "two", "three", pictures=2)
            await bench.executor.close()

            assert [outcome.error for outcome in outcomes] == [None] * 3
            assert {outcome.provider for outcome in outcomes} <= {"alpha", "beta"}
            assert all(outcome.agreement_id and outcome.activity_id and outcome.cost for outcome in outcomes)
            assert bench.store.spent() == bench.paid() > 0
            assert bench.store.agreements(is_settled=False) == []
            assert [each.id for each in bench.store.allocations(is_open=True)] == []
            assert not [each for each in bench.devnet.market.agreements.values() if each.state == "Approved"]

    asyncio.run(asyncio.wait_for(main(), 60))
