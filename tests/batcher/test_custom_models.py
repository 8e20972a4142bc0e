"""A custom model in the batcher: claimed, run by a real worker, recorded."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from batcher.cycle import available_models
from batcher.executors.local import LocalExecutor, _guess_first_model
from provider_image.images.decoding import decode
from store.states import RequestState
from tests.batcher.conftest import Harness
from tests.contexts import make_context
from tests.custom_models import classifier


def test_custom_models_are_available_while_they_are_installed(tmp_path: Path, custom_models_folder: Path) -> None:
    shutil.copytree(custom_models_folder / "my_pets", tmp_path / "my_pets")

    assert "my_pets" in available_models(tmp_path)
    row = _guess_first_model(tmp_path)
    assert row is not None and row.name == "my_pets"

    (tmp_path / "my_pets" / "model.json").unlink()

    assert "my_pets" not in available_models(tmp_path)


def test_a_real_worker_answers_for_a_custom_model_as_keras_does(
    tmp_path: Path, custom_models_folder: Path, photos: dict[str, bytes]
) -> None:

    import numpy as np

    harness = Harness(tmp_path, custom_models_folder)
    requests = [harness.add(photo, model="my_pets") for photo in photos.values()]

    async def main() -> None:
        harness.executor = LocalExecutor(make_context(harness.settings.work / "local", harness.models, MLG_WORKERS="2"))
        await harness.executor.start()
        try:
            cycle = harness.cycle()
            cycle.flush()
            await cycle.run(asyncio.Event())
        finally:
            await harness.executor.close()

    asyncio.run(main())

    network = classifier()
    for request, photo in zip(harness.reload(*requests), photos.values(), strict=True):
        assert request.state is RequestState.DONE, request.reason
        keras_output = np.asarray(network(decode(photo, 32, 32, None)[None].astype(np.float32), training=False))[0]
        found = {name: probability for _, name, probability in request.output or []}
        expected = dict(zip(("cat", "dog", "parrot"), keras_output.tolist(), strict=True))
        assert found == pytest.approx(expected, abs=1e-4)
    harness.store.close()
