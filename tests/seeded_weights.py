"""Seeded weights for tests and benchmarks, scaled so that results are neither uniform nor certain.

In the format of the files that Keras publishes. They are only written to folders of a test or benchmark.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provider_image.compiler.keras_graph import import_keras
from provider_image.compiler.self_test import self_test_images
from provider_image.images.decoding import decode
from provider_image.models.catalogue import ModelRow
from tests import needs_keras  # noqa: F401 - importing it is its use

#: Largest standard deviation of the logits of a photo. Random networks are worse conditioned than trained ones: at 2.5
#: the rounding of f32 causes differences of 0.0001 in a ResNet152.
_DEVIATION = 2.0
#: Weights of a network from which on it is large.
_LARGE = 50_000_000


def seeded_network(row: ModelRow, seed: int = 7, make: Callable[[], Any] | None = None) -> Any:
    """Make a model of the row's class with seeded weights that give different results for different photos.

    Batch normalisations get the statistics of photos, as if trained; then the last layer is centred and scaled.

    :param make: makes the network; by default the row's class does.
    """
    import numpy as np

    keras = import_keras()
    keras.utils.set_random_seed(seed)
    network = getattr(keras.applications, row.keras_class)(weights=None) if make is None else make()
    module = importlib.import_module(getattr(keras.applications, row.keras_class).__module__)
    arrays = [decode(data, row.height, row.width, row.crop) for data in self_test_images().values()]
    batch = module.preprocess_input(np.stack(arrays).astype(np.float32))
    random = np.random.default_rng(seed)
    for layer in network.layers:
        if type(layer).__name__ == "BatchNormalization":
            layer.momentum = 0.0
            if layer.gamma is not None:
                # A residual branch that ends in a normalisation adds little, as in trained networks: with fifty that
                # add much, the rounding of f32, which depends on the processor, causes differences of 0.0002.
                low, high = (0.1, 0.2) if layer.name.endswith("_3_bn") else (0.3, 0.6)
                layer.gamma.assign(random.uniform(low, high, layer.gamma.shape))
            layer.beta.assign(random.normal(0, 0.2, layer.beta.shape))
        elif type(layer).__name__ == "LayerScale":
            layer.gamma.assign(random.uniform(0.1, 0.5, layer.gamma.shape))
        elif type(layer).__name__ == "Dropout":
            layer.rate = 0.0
    last = network.layers[-1]
    # One pass gives the normalisations their statistics and, by the same statistics, the last layer's input.
    seen = np.asarray(call(keras.Model(network.input, last.input), batch, training=True), np.float64)
    kernel = random.normal(size=last.kernel.shape)
    logits = (seen - seen.mean(axis=0)) @ kernel
    kernel *= _DEVIATION / logits.std(axis=1).max()
    last.kernel.assign(kernel)
    last.bias.assign(-(seen.mean(axis=0) @ kernel) + random.normal(0, 0.5, kernel.shape[1]))
    return network


def call(network: Any, batch: Any, *, training: bool = False) -> Any:
    """Call a network: a small one layer by layer, which is quicker than to make a function of tensorflow first.

    A large one as such a function, because the outputs of all its layers would take much memory.
    """
    if network.count_params() < _LARGE:
        return network(batch, training=training)
    return importlib.import_module("tensorflow").function(lambda images: network(images, training=training))(batch)


def write_weights(network: Any, path: Path) -> None:
    """Write a network's weights as Keras publishes its own: the legacy HDF5 layout."""
    import h5py

    legacy = importlib.import_module("keras.src.legacy.saving.legacy_h5_format")
    with h5py.File(path, "w") as file:
        legacy.save_weights_to_hdf5_group(file, network)
