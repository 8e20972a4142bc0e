"""What every peer computes: an image file, decoded by Pillow, to the five likeliest labels, by OpenVINO.

Imported by the servers beside it, in environments that have no mlg, and by the benchmark for the plain limit. It reads
an installed artefact of an image classifier that has its preprocessing in the graph.
"""

from __future__ import annotations

import io
import json
import os
import queue
from pathlib import Path

import numpy as np
import openvino
from PIL import Image

#: The folder of the artefact, and the number of processes or threads that compute at once.
FOLDER_VARIABLE, CORES_VARIABLE = "PEER_MODEL", "PEER_CORES"
TOP = 5


def cores() -> int:
    """Return the number of processes or threads that shall compute at once."""
    return int(os.environ[CORES_VARIABLE])


class Classifier:
    """A loaded model; any number of threads may call it, of which `threads` infer at once."""

    def __init__(self, folder: Path, threads: int) -> None:
        facts = json.loads((folder / "model.json").read_text())
        self._labels = [name for _, name in facts["labels"]]
        self._size, self._crop = (facts["width"], facts["height"]), facts["crop"]
        # Without pinning: processes that are pinned each by themselves share one core.
        options = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": str(threads),
            "INFERENCE_NUM_THREADS": str(threads),
            "ENABLE_CPU_PINNING": "NO",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = openvino.Core().compile_model(str(folder / "model.xml"), "CPU", options)
        self._requests: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()
        for _ in range(threads):
            self._requests.put(compiled.create_infer_request())
        # One inference before threads come: the binding deadlocks if two are its first.
        self.infer(np.zeros((*self._size[::-1], 3), np.uint8))

    @classmethod
    def from_environment(cls, threads: int) -> Classifier:
        """Load the artefact that FOLDER_VARIABLE names."""
        return cls(Path(os.environ[FOLDER_VARIABLE]), threads)

    def decode(self, image: bytes) -> np.ndarray:
        """Decode an image to the model's input: centre crop, bicubic. :return: uint8, (height, width, 3)."""
        with Image.open(io.BytesIO(image)) as opened:
            picture = opened.convert("RGB")
        side = int(self._crop * min(picture.size))
        left, top = (picture.width - side + 1) // 2, (picture.height - side + 1) // 2
        box = (left, top, left + side, top + side)
        return np.asarray(picture.resize(self._size, Image.Resampling.BICUBIC, box))

    def infer(self, pixels: np.ndarray) -> list[tuple[str, float]]:
        """Return the likeliest labels with their probabilities."""
        request = self._requests.get()
        try:
            scores = request.infer({0: pixels[None]}, share_inputs=True, share_outputs=True)[0][0].copy()
        finally:
            self._requests.put(request)
        return [(self._labels[index], round(float(scores[index]), 6)) for index in np.argsort(-scores)[:TOP]]

    def classify(self, image: bytes) -> list[tuple[str, float]]:
        """Decode and infer."""
        return self.infer(self.decode(image))
