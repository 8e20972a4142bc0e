"""The service `crop`: a rectangle of one image, turned upright.

The part is cut out where the image is decoded, so the net has nothing to do. In this way, what was found in an image,
such as a face, becomes an image of its own for services that take whole images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.errors import MalformedResults
from provider_image.images.decoding import ImagePart, decode_part
from provider_image.images.headers import MAX_SIDE
from provider_image.images.outputs import FORMAT, IMAGE_OUTPUT, check_image, compare_images, encode_image, image_format
from provider_image.service import IMAGE_ANSWER, Difference, Output, OutputFile, Param
from provider_image.services.one_image import OneImage

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Net
    from provider_image.models.artefact import Artefact

#: Most pixels on a side of the result.
MAX_RESULT_SIDE = 2048


def _pixels(name: str, help: str) -> Param:
    return Param(name=name, kind="number", default=0.0, minimum=0, maximum=MAX_SIDE, help=help)


class Crop(OneImage):
    """See `provider_image.service.Service`."""

    name = "crop"
    title = "Crop"
    help = "Cuts a rectangle out of an image, turned upright: with its box and angle, a face that was found in it."
    params: tuple[Param, ...] = (
        _pixels("left", "Left edge in pixels of the image as it is shown, upright."),
        _pixels("upper", "Upper edge in pixels."),
        _pixels("width", "Width in pixels; 0 takes all up to the image's right edge."),
        _pixels("height", "Height in pixels; 0 takes all down to the image's lower edge."),
        Param(
            name="centre",
            kind="number",
            default=0.0,
            minimum=0,
            maximum=1,
            help="Side of a square in the image's centre, as a share of the shorter side, in place of left, upper, "
            "width and height; 0 takes those.",
        ),
        Param(
            name="angle",
            kind="number",
            default=0.0,
            minimum=-180,
            maximum=180,
            help="By how many degrees what is to be cut out is turned clockwise; it is turned back.",
        ),
        Param(
            name="margin",
            kind="number",
            default=0.0,
            minimum=0,
            maximum=1,
            help="What is added on each side, as a share of width and height.",
        ),
        Param(
            name="side",
            kind="whole",
            default=MAX_RESULT_SIDE // 2,
            minimum=16,
            maximum=MAX_RESULT_SIDE,
            help="Most pixels of the result's longer side; a larger part is scaled down.",
        ),
        FORMAT,
    )
    outputs: Mapping[str, OutputFile] = {IMAGE_ANSWER: IMAGE_OUTPUT}
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["width", "height", "format"],
        "properties": {
            **{
                name: {
                    "type": "integer",
                    "minimum": 1,
                    "maximum": MAX_RESULT_SIDE,
                    "description": "pixels of the result",
                }
                for name in ("width", "height")
            },
            "format": {"type": "string", "enum": list(FORMAT.choices)},
        },
    }
    example: Mapping[str, Any] = {"width": 160, "height": 200, "format": "png"}

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> np.ndarray[Any, Any]:
        """Decode the part of the image. It is never resized before."""
        import numpy as np

        def find_part(width: int, height: int) -> ImagePart:
            left, top = params["left"], params["upper"]
            part_width = params["width"] or max(1.0, width - left)
            part_height = params["height"] or max(1.0, height - top)
            if params["centre"]:
                part_width = part_height = max(1.0, params["centre"] * min(width, height))
                left, top = (width - part_width) / 2, (height - part_height) / 2
            across, down = params["margin"] * part_width, params["margin"] * part_height
            return ImagePart(
                left=left - across,
                top=top - down,
                width=part_width + 2 * across,
                height=part_height + 2 * down,
                angle=params["angle"],
            )

        return np.asarray(decode_part(inputs["image"], find_part, params["side"]))

    def run(self, net: Net, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        """Encode each part."""
        outputs = []
        for pixels, each in zip(net.infer(items), params, strict=True):
            data = encode_image(pixels, each["format"])
            facts = {"width": pixels.shape[1], "height": pixels.shape[0], "format": image_format(data)}
            outputs.append(Output(data=facts, files={IMAGE_ANSWER: data}))
        return outputs

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check that the file has the size that is said, within what was asked for. :raises MalformedResults:"""
        data = output.data
        if not isinstance(data, dict) or data.keys() != {"width", "height", "format"}:
            raise MalformedResults("The output of a crop must be its width, height and format.")
        if not all(type(data[name]) is int and 1 <= data[name] <= params["side"] for name in ("width", "height")):
            raise MalformedResults(f"Width and height must be whole numbers from 1 to {params['side']}.")
        if data["format"] != params["format"]:
            raise MalformedResults("The image has another format than was asked for.")
        check_image(output.files[IMAGE_ANSWER], width=data["width"], height=data["height"], format=params["format"])

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Return the largest difference of a pixel, as a share of white; 1 if the sizes differ."""
        one, other = (each.files.get(IMAGE_ANSWER, b"") for each in (expected, output))
        return compare_images(one, other)

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return all of it."""
        return output
