"""Keras in a separate process, as a simple script would use it: the comparison for mlg's runtime.

`cold CLASS WEIGHTS CHUNK OUT` does one chunk of images including the import and writes the top five labels of
each and its peak memory; `warm CLASS WEIGHTS CHUNK` answers each line with a number of seconds on standard input with
the images per second of `predict` on ready arrays, in batches as large as the chunk.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from provider_image.chunk import open_chunk
from provider_image.runtime import peak_memory_bytes

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def load(keras_class: str, weights: Path) -> tuple[Any, Any]:
    """Import Keras, build the class and load the weights. :return: the network and the class's module."""
    import keras

    network = getattr(keras.applications, keras_class)(weights=None)
    network.load_weights(weights)
    return network, importlib.import_module(getattr(keras.applications, keras_class).__module__)


def batch_of(chunk: Path, side: int) -> Any:
    """Decode a chunk's images as `keras.utils.load_img` does: to the model's size, without keeping proportions."""
    import numpy as np
    from PIL import Image

    with open_chunk(chunk) as reader:
        files = [reader.read_inputs(item)["image"] for item in reader.items]
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    resized = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image, dtype=np.float32) for image in resized])


if __name__ == "__main__":
    way, keras_class, weights, chunk = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    network, module = load(keras_class, weights)
    arrays = module.preprocess_input(batch_of(chunk, network.input_shape[1]))
    probabilities = network.predict(arrays, batch_size=len(arrays), verbose=0)
    if way == "cold":
        best = (-probabilities).argsort(axis=1)[:, :5].tolist()
        Path(sys.argv[5]).write_text(json.dumps({"best": best, "peak_memory_bytes": peak_memory_bytes()}))
    else:
        from scripts.benchmarks.measuring import rate

        for line in sys.stdin:
            print(
                rate(lambda: len(network.predict(arrays, batch_size=len(arrays), verbose=0)), float(line)), flush=True
            )
