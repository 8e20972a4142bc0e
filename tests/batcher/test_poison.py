"""An image that kills the process that decodes it, with real workers: it affects no other request."""

from __future__ import annotations

import asyncio
import io
from typing import Any

from PIL import Image

from batcher.executors.local import LocalExecutor
from store.requests import MAX_ATTEMPTS
from store.states import RequestState
from tests.contexts import make_context

#: Decoders ignore bytes after the end of an image; here they end the process, as a bug in a decoder may.
PLUGIN = """
import os
import provider_image.images.decoding as imaging

def decode(data, *arguments, plain=imaging.decode, **options):
    if bytes(data).endswith(b"POISON"):
        os._exit(139)
    return plain(data, *arguments, **options)

imaging.decode = decode
"""


def small_image(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (number * 15, 255 - number * 15, 90)).save(file, "PNG")
    return file.getvalue()


def test_an_image_that_always_kills_its_worker_fails_alone(harness: Any, tmp_path: Any) -> None:
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "sitecustomize.py").write_text(PLUGIN)
    requests = [harness.add(small_image(number) + (b"POISON" if number == 7 else b"")) for number in range(16)]
    poison = requests.pop(7)

    async def main() -> None:
        context = make_context(tmp_path / "local", harness.models, MLG_WORKERS="2", PYTHONPATH=str(plugin))
        harness.executor = LocalExecutor(context)
        await harness.executor.start()
        cycle = harness.cycle()
        while harness.reload(poison)[0].state is not RequestState.FAILED:
            cycle.flush()
            await cycle.run(asyncio.Event())
            harness.clock.advance(20)
        await harness.executor.close()

    asyncio.run(asyncio.wait_for(main(), 300))

    (failed,) = harness.reload(poison)
    assert (failed.attempts, failed.code) == (MAX_ATTEMPTS, "worker_died")
    assert "status 139" in failed.reason
    others = harness.reload(*requests)
    assert {(request.state, request.attempts) for request in others} == {(RequestState.DONE, 0)}
    assert all(len(request.output) == 20 for request in others)
