"""The limits of the machine, and the operations of a graph."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from provider_image.backends.openvino import import_openvino
from provider_image.cores import available_cores
from scripts.benchmarks.measuring import timed

#: Sides of the square matrices that are multiplied.
_SIDES = (512, 1024, 2048)


def f32_gigaflops(seconds: float = 1.0) -> float:
    """Multiply f32 matrices on all cores, by numpy and by OpenVINO (one stream, a stream for each core); the best.

    :param seconds: for each way and size.
    """
    cores, found = available_cores(), []
    for side in _SIDES:
        matrix = np.random.default_rng(side).random((side, side), np.float32)
        product, flops = np.empty_like(matrix), 2.0 * side**3
        found.append(flops / _shortest(lambda m=matrix, p=product: np.matmul(m, m, out=p), seconds))  # type: ignore[misc]
        for streams in {1, cores}:
            requests = _multiplications(matrix, streams, cores)

            def multiply(requests: list[Any] = requests, matrix: Any = matrix) -> None:
                for request in requests:
                    request.start_async({0: matrix}, share_inputs=True)
                for request in requests:
                    request.wait()

            found.append(flops * streams / _shortest(multiply, seconds))
    return max(found) / 1e9


def _multiplications(matrix: Any, streams: int, cores: int) -> list[Any]:
    openvino = import_openvino()
    left = openvino.opset8.parameter(matrix.shape, np.float32)
    product = openvino.opset8.matmul(left, openvino.opset8.constant(matrix), False, True)
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": str(cores),
        "NUM_STREAMS": str(streams),
        "ENABLE_CPU_PINNING": "NO",
    }
    compiled = openvino.Core().compile_model(openvino.Model([product], [left]), "CPU", options)
    return [compiled.create_infer_request() for _ in range(streams)]


def _shortest(work: Callable[[], Any], seconds: float) -> float:
    work()
    shortest, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        shortest = min(shortest, timed(work))
    return shortest


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
