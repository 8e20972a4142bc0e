"""A user's own model on the batcher's road: claimed, worked on by a real worker, recorded."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from batcher.cycle import servable
from batcher.executors.local import LocalExecutor, _likeliest_model
from provider_image.images.decoding import decode
from store.records import State
from tests.batcher.conftest import Bench
from tests.custom_models import classifier


def test_own_models_can_be_served_while_they_are_installed(tmp_path: Path, own_models_folder: Path) -> None:
    shutil.copytree(own_models_folder / "my_pets", tmp_path / "my_pets")

    assert "my_pets" in servable(tmp_path)
    row = _likeliest_model(tmp_path)
    assert row is not None and row.name == "my_pets"

    (tmp_path / "my_pets" / "model.json").unlink()

    assert "my_pets" not in servable(tmp_path)


def test_own_model_is_answered_by_a_real_worker_as_by_keras(
    tmp_path: Path, own_models_folder: Path, photos: dict[str, bytes]
) -> None:

    import numpy as np

    bench = Bench(tmp_path, own_models_folder)
    requests = [bench.add(photo, model="my_pets") for photo in photos.values()]

    async def main() -> None:
        bench.executor = LocalExecutor(bench.settings)
        await bench.executor.start()
        try:
            cycle = bench.cycle()
            cycle.take_all()
            await cycle.run(asyncio.Event())
        finally:
            await bench.executor.close()

    asyncio.run(main())

    network = classifier()
    for request, photo in zip(bench.again(*requests), photos.values(), strict=True):
        assert request.state is State.DONE, request.reason
        right = np.asarray(network(decode(photo, 32, 32, None)[None].astype(np.float32), training=False))[0]
        found = {name: probability for _, name, probability in request.output or []}
        expected = dict(zip(("cat", "dog", "parrot"), right.tolist(), strict=True))
        assert found == pytest.approx(expected, abs=1e-4)
    bench.store.close()
