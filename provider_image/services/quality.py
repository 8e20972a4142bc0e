"""The service `quality`: how sharp, bright, rich in contrast, noisy, tilted and uniform an image is.

The same numbers are measured of uploads with limits, see `provider_image/images/quality.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.errors import InferenceFailed, MalformedResults
from provider_image.images.decoding import decode_and_measure
from provider_image.images.headers import MAX_SIDE
from provider_image.images.quality import MEASURED_SIDE, MEASURES, describe
from provider_image.service import Difference, Output, OutputFile, Param
from provider_image.services.one_image import OneImage

if TYPE_CHECKING:
    from provider_image.backends import Net
    from provider_image.models.artefact import Artefact

#: Measures that an image may lack.
_MAY_BE_NULL = ("tilt",)


class Quality(OneImage):
    """See `provider_image.service.Service`."""

    name = "quality"
    title = "Image quality"
    help = "Measures an image: sharpness, brightness, contrast, noise, tilt, size, and whether it is nearly one colour."
    params: tuple[Param, ...] = ()
    outputs: Mapping[str, OutputFile] = {}
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["width", "height", *MEASURES],
        "properties": {
            "width": {"type": "integer", "minimum": 1, "description": "pixels of the upright image"},
            "height": {"type": "integer", "minimum": 1, "description": "pixels of the upright image"},
            **{
                name: {
                    "type": ["number", "null"] if name in _MAY_BE_NULL else "number",
                    "minimum": lowest,
                    "maximum": highest,
                    "description": what,
                }
                for name, (lowest, highest, what) in MEASURES.items()
            },
        },
    }
    example: Mapping[str, Any] = {
        "width": 451,
        "height": 300,
        "sharpness": 311.4085,
        "brightness": 0.4542,
        "contrast": 0.3188,
        "dark": 0.0001,
        "bright": 0.0,
        "noise": 2.2239,
        "tilt": None,
        "uniformity": 0.0159,
    }

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> Any:
        """Decode the image to what is measured, and read the size of the whole. It is never resized before."""
        import numpy as np

        image, size = decode_and_measure(inputs["image"], MEASURED_SIDE)
        return np.asarray(image), size

    def run(self, net: Net, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        """Measure decoded images. :raises InferenceFailed: the net did not return the measures."""
        outputs = []
        for values, (_, size) in zip(net.infer([pixels for pixels, _ in items]), items, strict=True):
            if values.shape != (len(MEASURES),):
                raise InferenceFailed(f"The model {net.artefact.name} did not return {len(MEASURES)} numbers.")
            outputs.append(Output(data=describe(values, size)))
        return outputs

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check that each measure is within its range. :raises MalformedResults:"""
        data = output.data
        if not isinstance(data, dict) or data.keys() != {"width", "height", *MEASURES}:
            raise MalformedResults("The output must have the size and the measures of an image.")
        if not all(type(data[side]) is int and 1 <= data[side] <= MAX_SIDE for side in ("width", "height")):
            raise MalformedResults("The width and the height must be those of an image.")
        for name, (lowest, highest, _) in MEASURES.items():
            value = data[name]
            if value is None and name in _MAY_BE_NULL:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
                raise MalformedResults(f"The {name} must be a number from {lowest:g} to {highest:g}.")

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Return the largest difference of a measure; of those beyond 1, as a share of it."""
        gaps = [
            0.0
            if expected.data[name] == output.data[name]
            else math.inf
            if None in (expected.data[name], output.data[name])
            else abs(expected.data[name] - output.data[name]) / max(1.0, abs(expected.data[name]))
            for name in expected.data
        ]
        return Difference(largest=max(gaps), is_same_order=True)

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return all of it."""
        return output
