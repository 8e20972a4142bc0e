"""The runtime of mlg, warm and in this process: images per second of its parts and of the whole."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from provider_image.backends import Device
from provider_image.backends.openvino import compile_graph, import_openvino
from provider_image.chunk import open_chunk
from provider_image.images.decoding import decode
from provider_image.models.artefact import find_artefact
from provider_image.runtime import NetCache, run_chunk
from scripts.benchmarks.measuring import parallel_rate, rate


def runtime_rates(models: Path, model: str, chunk: Path) -> dict[str, Callable[[float], float]]:
    """Return what can be measured: name -> a function that does it for some seconds and returns images per second.

    - chunk: whole chunks from file to file as in a worker, including decoding
    - net, bf16: the bare net on ready arrays, as many threads as cores, in f32 and in bf16
    - queue: OpenVINO's own AsyncInferQueue on ready arrays, same options
    - decode, pillow: decoding alone on all cores, as in the runtime and by Pillow at full scale, without resizing

    Nets are loaded when they are first needed.
    """
    f32, bf16 = (NetCache(models, Device(precision=precision)) for precision in ("f32", "bf16"))
    artefact = find_artefact(models, model)
    with open_chunk(chunk) as reader:
        images = [reader.read_inputs(item)["image"] for item in reader.items]

    def decoded(image: bytes) -> Any:
        return decode(image, artefact.height, artefact.width, artefact.crop)

    arrays = [decoded(image) for image in images]

    def net_rate(cache: NetCache, seconds: float) -> float:
        net = cache.get("classification", model, None).net
        return parallel_rate(lambda array: net.infer([array]), arrays, seconds)

    @functools.cache
    def queue() -> tuple[Any, Any]:
        compiled = compile_graph(artefact.folder / "model.xml", f32.device.threads, "f32")
        return compiled, import_openvino().AsyncInferQueue(compiled.graph, f32.device.threads)

    def infer_all() -> int:
        for array in arrays:
            queue()[1].start_async({0: array[None]}, share_inputs=True)
        queue()[1].wait_all()
        return len(arrays)

    return {
        "chunk": lambda seconds: rate(lambda: len(run_chunk(chunk, chunk.with_suffix(".warm"), f32).items), seconds),
        "net": lambda seconds: net_rate(f32, seconds),
        "bf16": lambda seconds: net_rate(bf16, seconds),
        "queue": lambda seconds: rate(infer_all, seconds),
        "decode": lambda seconds: parallel_rate(decoded, images, seconds),
        "pillow": lambda seconds: parallel_rate(lambda image: Image.open(io.BytesIO(image)).load(), images, seconds),
    }
