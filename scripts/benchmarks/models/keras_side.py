"""Keras in a separate process, as a simple script would use it: the comparison for mlg's runtime.

`cold MODEL WEIGHTS CHUNK OUT` does one chunk of images including the import and writes the probabilities of
each and its peak memory; `warm MODEL WEIGHTS CHUNK` answers each line with a number of seconds on standard input with
the images per second of `predict` on ready arrays, in batches as large as the chunk.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provider_image.chunk import open_chunk
from provider_image.compiler.keras_graph import preprocess
from provider_image.models.catalogue import CATALOGUE
from provider_image.runtime import peak_memory_bytes

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def load(name: str, weights: Path) -> tuple[Any, Callable[[Any], Any]]:
    """Import Keras or keras-hub, build a model of the catalogue and load the weights.

    :return: the network, and its preprocessing of arrays.
    """
    row = CATALOGUE[name]
    if row.transformer is not None:
        from tests.keras_hub_networks import keras_hub_network
        from tests.transformer_folders import read_tensors

        config = json.loads((weights / "config.json").read_text())
        network = keras_hub_network(config, read_tensors(weights / "model.safetensors"))
        return network, functools.partial(preprocess, preprocessing=row.preprocessing)
    import keras

    make = getattr(keras.applications, str(row.keras_class))
    network = make(weights=None)
    network.load_weights(weights)
    return network, importlib.import_module(make.__module__).preprocess_input


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
    way, name, weights, chunk = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    network, prepare = load(name, weights)
    arrays = prepare(batch_of(chunk, network.input_shape[1]))
    probabilities = network.predict(arrays, batch_size=len(arrays), verbose=0)
    if way == "cold":
        answers = {"probabilities": probabilities.tolist(), "peak_memory_bytes": peak_memory_bytes()}
        Path(sys.argv[5]).write_text(json.dumps(answers))
    else:
        from scripts.benchmarks.support.measuring import rate

        for line in sys.stdin:
            print(
                rate(lambda: len(network.predict(arrays, batch_size=len(arrays), verbose=0)), float(line)), flush=True
            )
