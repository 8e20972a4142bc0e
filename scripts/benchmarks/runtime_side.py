"""The runtime of mlg in a separate warm process, measured on request: `runtime_side MODELS MODEL`.

Answers each line `{"way": WAY, "seconds": S, "chunk": PATH}` on standard input with images per second:

- chunk: whole chunks from file to file as in a worker, including decoding
- net, bf16: the bare net on ready arrays, as many threads as cores, in f32 and in bf16
- queue: OpenVINO's own AsyncInferQueue on ready arrays, same options
- decode, pillow: decoding alone on all cores, as in the runtime and by Pillow at full scale
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from provider_image.backends import Device
from provider_image.backends.openvino import compile_graph, import_openvino
from provider_image.chunk import open_chunk
from provider_image.images.decoding import decode
from provider_image.runtime import NetCache, run_chunk
from scripts.benchmarks.limits import decoding_rate


class RuntimeBenchmark:
    """The nets of one model, loaded when they are first needed."""

    def __init__(self, models: Path, model: str) -> None:
        self._model = model
        self._caches = {precision: NetCache(models, Device(precision=precision)) for precision in ("f32", "bf16")}
        self._queue: Any = None

    def rate(self, way: str, seconds: float, chunk: Path) -> float:
        """Run one of the ways for about this many seconds. :return: images per second."""
        images = _images(chunk)
        if way == "pillow":
            return decoding_rate(images, _decode_whole, seconds)
        cache = self._caches["bf16" if way == "bf16" else "f32"]
        loaded = cache.get("classification", self._model, None)
        height, width, crop = loaded.artefact.height, loaded.artefact.width, loaded.artefact.crop
        if way == "decode":
            return decoding_rate(images, lambda data: decode(data, height, width, crop), seconds)
        if way == "chunk":
            return _repeat(lambda: len(run_chunk(chunk, chunk.with_suffix(".results"), cache).items), seconds)
        arrays = [decode(data, height, width, crop) for data in images]
        if way == "queue":
            return self._queued(loaded.artefact.folder, cache.device.threads, arrays, seconds)
        with ThreadPoolExecutor(cache.device.threads) as pool:
            return _repeat(lambda: len(list(pool.map(lambda array: loaded.net.infer([array]), arrays))), seconds)

    def _queued(self, folder: Path, threads: int, arrays: list[Any], seconds: float) -> float:
        if self._queue is None:
            compiled = compile_graph(folder / "model.xml", threads, "f32")
            self._queue = (compiled, import_openvino().AsyncInferQueue(compiled.graph, threads))
        queue = self._queue[1]

        def turn() -> int:
            for array in arrays:
                queue.start_async({0: array[None]}, share_inputs=True)
            queue.wait_all()
            return len(arrays)

        turn()
        return _repeat(turn, seconds)


def _repeat(turn: Callable[[], int], seconds: float) -> float:
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        done += turn()
    return done / (time.perf_counter() - started)


def _images(chunk: Path) -> list[bytes]:
    with open_chunk(chunk) as reader:
        return [reader.read_inputs(item)["image"] for item in reader.items]


def _decode_whole(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).load()


def main() -> None:
    """Answer lines until standard input ends."""
    side = RuntimeBenchmark(Path(sys.argv[1]), sys.argv[2])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(side.rate(request["way"], request["seconds"], Path(request["chunk"]))), flush=True)


if __name__ == "__main__":
    main()
