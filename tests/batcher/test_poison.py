"""A picture that kills the process which decodes it, with real workers: it harms nobody else."""

from __future__ import annotations

import asyncio
import io
from typing import Any

from PIL import Image

from batcher.executors.local import LocalExecutor
from store.records import State
from store.sqlite import MAX_ATTEMPTS

#: Bytes after the end of a picture do not bother a decoder; here they end its process, as a bug in one may.
PLUGIN = """
import os
import provider_image.images.decoding as imaging

def decode(data, *arguments, plain=imaging.decode, **options):
    if bytes(data).endswith(b"POISON"):
        os._exit(139)
    return plain(data, *arguments, **options)

imaging.decode = decode
"""


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (number * 15, 255 - number * 15, 90)).save(file, "PNG")
    return file.getvalue()


def test_a_picture_that_kills_its_worker_every_time_fails_alone(bench: Any, tmp_path: Any) -> None:
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "sitecustomize.py").write_text(PLUGIN)
    bench.change(workers=2)
    requests = [bench.add(picture(number) + (b"POISON" if number == 7 else b"")) for number in range(16)]
    poison = requests.pop(7)

    async def main() -> None:
        bench.executor = LocalExecutor(bench.settings, environment={"PYTHONPATH": str(plugin)})
        await bench.executor.start()
        cycle = bench.cycle()
        while bench.again(poison)[0].state is not State.FAILED:
            cycle.take_all()
            await cycle.run(asyncio.Event())
            bench.clock.turn(20)
        await bench.executor.close()

    asyncio.run(asyncio.wait_for(main(), 120))

    (failed,) = bench.again(poison)
    assert (failed.attempts, failed.code) == (MAX_ATTEMPTS, "worker_died")
    assert "status 139" in failed.reason
    neighbours = bench.again(*requests)
    assert {(request.state, request.attempts) for request in neighbours} == {(State.DONE, 0)}
    assert all(len(request.output) == 20 for request in neighbours)
