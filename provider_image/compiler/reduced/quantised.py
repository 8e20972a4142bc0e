"""Quantisation of a classifier's graph to int8 with NNCF, from photos alone: no training and no labels are needed.

Used by the builder, in a confined process. Layers can be left in f32, those first whose quantisation alone changes the
results most. NNCF's own search takes that from what is gained by leaving a layer out of a graph that is quantised
otherwise: where one layer ruins all answers, it says nothing of the others.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends.openvino import import_openvino
from provider_image.errors import CompilerMissing

if TYPE_CHECKING:
    import numpy as np

    Image = np.ndarray[Any, Any]

#: Part of the digest. Change it whenever the graphs' results change.
RECIPE = "int8-2"
#: Layers with weights.
_LAYERS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")
#: Operations between a layer and the constant of its weights.
_DECOMPRESSION = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "FakeQuantize")
#: Operations that keep the range of numbers, and so may be between their rounding and the layer that takes them.
_MOVING = ("MaxPool", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
#: Images with which layers are ranked: each is a graph of its own.
_RANKING_IMAGES = 32
_CPU = {"INFERENCE_PRECISION_HINT": "f32"}


def quantise(graph: Path, images: Sequence[Image], in_f32: Sequence[str] = (), *, is_rough: bool = False) -> Any:
    """Quantise the layers of a graph.

    :param graph: the graph file of an artefact.
    :param images: decoded photos, uint8 (height, width, 3), from which the ranges of numbers are measured.
    :param in_f32: names of layers that are not quantised.
    :param is_rough: leave out the correction of biases, which takes most of the time.
    :return: OpenVINO's Model.
    :raises CompilerMissing: NNCF is not installed.
    """
    nncf = _import_nncf()
    # On a processor that adds up products of 8 bits in 16 bits, these overflow. The copy may run on such a one too.
    fix = nncf.OverflowFix.ENABLE
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(
            import_openvino().Core().read_model(graph),
            nncf.Dataset([image[None] for image in images]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
            # Takes twice as long as the other way, and about halves how many first labels change.
            fast_bias_correction=False,
            ignored_scope=nncf.IgnoredScope(names=list(in_f32)) if in_f32 else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix, disable_bias_correction=is_rough),
        )


def rank_layers(graph: Path, images: Sequence[Image]) -> list[str]:
    """Return the names of the layers, first those whose quantisation alone changes the results most.

    :param graph, images: as in `quantise`.
    """
    import numpy as np

    core = import_openvino().Core()
    quantised = {layer.get_friendly_name(): layer for layer in _layers(quantise(graph, images, is_rough=True))}

    def results(model: Any) -> Image:
        compiled = core.compile_model(model, "CPU", _CPU)
        return np.stack([np.array(compiled(image[None])[0][0]) for image in images[:_RANKING_IMAGES]])

    expected, errors = results(core.read_model(graph)), {}
    for name in quantised:
        model = core.read_model(graph)
        layer = next(each for each in _layers(model) if each.get_friendly_name() == name)
        _imitate(layer, quantised[name])
        errors[name] = float(np.square(results(model) - expected).mean())
    return sorted(errors, key=lambda name: errors[name], reverse=True)


def count_layers(graph: Any) -> tuple[int, int]:
    """Count the layers with weights that are not int8, and all layers with weights."""
    types = [_weights(layer).get_element_type().get_type_name() for layer in _layers(graph)]
    return sum(each not in ("i8", "u8") for each in types), len(types)


def _layers(graph: Any) -> Iterator[Any]:
    """Yield the layers with weights; a product of two results is none."""
    for operation in graph.get_ordered_ops():
        if operation.get_type_name() in _LAYERS and _weights(operation) is not None:
            yield operation


def _weights(layer: Any) -> Any:
    """Return the constant of a layer's weights, None if they are no constant."""
    operation = layer.input_value(1).get_node()
    while operation.get_type_name() in _DECOMPRESSION:
        operation = operation.input_value(0).get_node()
    return operation if operation.get_type_name() == "Constant" else None


def _imitate(layer: Any, quantised: Any) -> None:
    """Round the input and the weights of a layer as they are in another graph."""
    openvino = import_openvino()
    op = openvino.opset13
    weights = openvino.Model([quantised.input_value(1)], [])
    values = openvino.Core().compile_model(weights, "CPU", _CPU)({})[0]
    layer.input(1).replace_source_output(op.constant(values.copy()).output(0))
    rounding = quantised.input_value(0).get_node()
    while rounding.get_type_name() in _MOVING:
        rounding = rounding.input_value(0).get_node()
    if rounding.get_type_name() == "FakeQuantize":
        limits = [op.constant(rounding.input_value(number).get_node().data.copy()) for number in range(1, 5)]
        levels = int(rounding.get_attributes()["levels"])
        rounded = op.fake_quantize(layer.input_value(0), *limits, levels)
        layer.input(0).replace_source_output(rounded.output(0))


def _import_nncf() -> Any:
    """Import NNCF. :raises CompilerMissing: it is not installed."""
    os.environ["NNCF_CI"] = "1"  # or else it sends usage data
    try:
        import nncf
    except ImportError as error:
        raise CompilerMissing(f'Quantising needs NNCF ({error}). Install it: pip install "mlg[quantise]"') from error
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf
