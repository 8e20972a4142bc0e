"""The limits of the machine, and the operations of a graph."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from provider_image.backends.openvino import import_openvino
from scripts.benchmarks.support.measuring import timed

#: Sides of the square matrices that are multiplied.
_SIDES = (512, 1024, 2048)


def f32_gigaflops(seconds: float = 1.0) -> float:
    """Multiply f32 matrices of each size by numpy, on all cores, for some seconds; return the best rate."""
    best = 0.0
    for side in _SIDES:
        matrix = np.random.default_rng(side).random((side, side), np.float32)
        product, end = np.empty_like(matrix), time.perf_counter() + seconds
        while time.perf_counter() < end:
            best = max(best, 2e-9 * side**3 / timed(lambda m=matrix, p=product: np.matmul(m, m, out=p)))  # type: ignore[misc]
    return best


def gigaflops_of(graph: Path) -> float:
    """Count the GFLOP per image: two operations for each multiply-add of the convolutions and matrix products."""
    total = 0.0
    for node in import_openvino().Core().read_model(str(graph)).get_ordered_ops():
        kind = node.get_type_name()
        if kind in ("Convolution", "GroupConvolution"):
            # (outputs, inputs, height, width), with the groups before that where there are any.
            weights = list(node.input(1).get_partial_shape().to_shape())
            total += math.prod(node.output(0).shape) * math.prod(weights[1 if kind == "Convolution" else 2 :])
        elif kind == "MatMul":
            first = list(node.input(0).get_partial_shape().to_shape())
            total += math.prod(node.output(0).shape) * first[-2 if node.get_attributes()["transpose_a"] else -1]
    return 2 * total / 1e9
