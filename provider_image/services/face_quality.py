"""The service `face_quality`: how well the face on an image can be seen.

What is measured is in `provider_image/faces/quality.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.errors import InferenceFailed, MalformedResults
from provider_image.faces.quality import FACE_SIDE, MEASURES, PROBLEMS, describe, find_problems
from provider_image.images.headers import MAX_SIDE
from provider_image.service import Difference, Output, OutputFile, Param
from provider_image.services.one_image import OneImage

if TYPE_CHECKING:
    from provider_image.backends import Net
    from provider_image.images.decoding import FittedImage
    from provider_image.models.artefact import Artefact

#: Longest side that is decoded: enough to scale down from.
_DECODED_SIDE = 4 * FACE_SIDE
_SIDES = ("width", "height")


class FaceQuality(OneImage):
    """See `provider_image.service.Service`."""

    name = "face_quality"
    title = "Face quality"
    help = "Measures an image of one face: size, sharpness, light and symmetry, and names what is wrong."
    params: tuple[Param, ...] = ()
    outputs: Mapping[str, OutputFile] = {}
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": [*_SIDES, *MEASURES, "problems"],
        "properties": {
            **{
                side: {"type": "integer", "minimum": 1, "maximum": MAX_SIDE, "description": "pixels of the image"}
                for side in _SIDES
            },
            **{
                name: {"type": "number", "minimum": lowest, "maximum": highest, "description": what}
                for name, (lowest, highest, what) in MEASURES.items()
            },
            "problems": {
                "type": "array",
                "maxItems": len(PROBLEMS),
                "items": {"type": "string", "enum": list(PROBLEMS)},
                "description": "what is wrong with it; empty for a face that can be seen well",
            },
        },
    }
    example: Mapping[str, Any] = {
        "width": 121,
        "height": 121,
        "sharpness": 812.4,
        "brightness": 0.5127,
        "contrast": 0.4521,
        "evenness": 0.9312,
        "symmetry": 0.8245,
        "problems": (),
    }

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> FittedImage:
        """Decode the image to at most what is measured, and keep its size. It is never resized before."""
        from provider_image.images.decoding import decode_fitted

        return decode_fitted(inputs["image"], _DECODED_SIDE, _DECODED_SIDE)

    def run(self, net: Net, items: Sequence[FittedImage], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        """Measure decoded images. :raises InferenceFailed: the net did not return the measures."""
        outputs = []
        for item, values in zip(items, net.infer([item.pixels for item in items]), strict=True):
            if values.shape != (len(MEASURES),):
                raise InferenceFailed(f"The model {net.artefact.name} did not return {len(MEASURES)} numbers.")
            outputs.append(Output(data=describe(values, item.width, item.height)))
        return outputs

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check that each measure is within its range, and that the problems follow. :raises MalformedResults:"""
        data = output.data
        if not isinstance(data, dict) or data.keys() != {*_SIDES, *MEASURES, "problems"}:
            raise MalformedResults("The output must have the size, the measures and the problems of a face.")
        if not all(type(data[side]) is int and 1 <= data[side] <= MAX_SIDE for side in _SIDES):
            raise MalformedResults("The width and the height must be those of an image.")
        for name, (lowest, highest, _) in MEASURES.items():
            value = data[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
                raise MalformedResults(f"The {name} must be a number from {lowest:g} to {highest:g}.")
        if data["problems"] != find_problems(data, data["width"], data["height"]):
            raise MalformedResults("The problems are not those that follow from the measures.")

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Return the largest difference of a measure; of those beyond 1, as a share of it."""
        one, other = expected.data, output.data
        if any(one[side] != other[side] for side in _SIDES):
            return Difference(largest=math.inf, is_same_order=False)
        gaps = [abs(one[name] - other[name]) / max(1.0, abs(one[name])) for name in MEASURES]
        return Difference(largest=max(gaps), is_same_order=True)

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return all of it."""
        return output
