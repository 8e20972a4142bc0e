"""The service `image_to_image`: one image in, one image out, for example without its noise, in a style, or larger.

The net takes uint8 RGB and returns RGB values from 0 to 255. One with tiles takes parts of a fixed size, which are put
together without seams (`provider_image/images/tiling.py`); one without takes the whole image and returns as many
pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.errors import BrokenArtefact, ImageTooLarge, InferenceFailed, MalformedResults
from provider_image.images.decoding import decode_and_measure
from provider_image.images.headers import MAX_SIDE, read_header
from provider_image.images.outputs import (
    FORMAT,
    IMAGE_OUTPUT,
    MAX_OUTPUT_PIXELS,
    check_image,
    compare_images,
    encode_image,
    image_format,
)
from provider_image.images.tiling import Tiling, run_tiled, to_pixels
from provider_image.progress import report_progress
from provider_image.service import IMAGE_ANSWER, Difference, Output, OutputFile, Param
from provider_image.services.one_image import OneImage

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Device, Net
    from provider_image.models.artefact import Artefact

    Array = np.ndarray[Any, Any]

AMOUNT = Param(
    name="amount",
    kind="number",
    default=1.0,
    minimum=0,
    maximum=1,
    help="How much of the change is applied; 0 returns the image as it was, only resized if the model does that.",
)


class ImageToImage(OneImage):
    """See `provider_image.service.Service`."""

    name = "image_to_image"
    title = "Image to image"
    help = "Changes an image, for example removes its noise, and returns it."
    #: A large image takes many seconds; see `provider_image.services.chunk_items`.
    chunk_items = 1
    params = (FORMAT, AMOUNT)
    outputs: Mapping[str, OutputFile] = {IMAGE_ANSWER: IMAGE_OUTPUT}
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["width", "height", "format"],
        "properties": {
            "width": {"type": "integer", "minimum": 1, "description": "pixels of the returned image"},
            "height": {"type": "integer", "minimum": 1, "description": "pixels of the returned image"},
            "format": {"type": "string", "description": "png or jpeg"},
        },
    }
    example: Mapping[str, Any] = {"width": 451, "height": 300, "format": "png"}

    def load(self, artefact: Artefact, device: Device) -> Net:
        """Load the artefact's graph. :raises BrokenArtefact: also if its tiles are impossible."""
        if artefact.tile != (0, 0):
            try:
                Tiling.of(artefact)
            except ValueError as error:
                raise BrokenArtefact(f"The model {artefact.name} cannot be used: {error}.") from error
        return super().load(artefact, device)

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> Any:
        """Decode the whole image, upright. It is never resized before.

        :raises ImageTooLarge: the answer would have too many pixels.
        """
        import numpy as np

        data, scale = inputs["image"], artefact.scale
        header = read_header(data, MAX_OUTPUT_PIXELS)
        width, height = header.width * scale, header.height * scale
        if width * height > MAX_OUTPUT_PIXELS or max(width, height) > MAX_SIDE:
            raise ImageTooLarge(
                f"The answer would have {width} x {height} pixels; at most {MAX_OUTPUT_PIXELS / 1e6:g} million, and "
                f"{MAX_SIDE} on a side, are allowed. Scale the image down and send it again."
            )
        return np.asarray(decode_and_measure(data, MAX_SIDE)[0])

    def run(self, net: Net, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        """Change decoded images. :raises InferenceFailed: the net did not return images."""
        outputs = []
        for number, (pixels, each) in enumerate(zip(items, params, strict=True)):
            changed = _mix(pixels, self._run(net, pixels, number), each["amount"])
            data = encode_image(changed, each["format"])
            facts = {"width": changed.shape[1], "height": changed.shape[0], "format": image_format(data)}
            outputs.append(Output(data=facts, files={IMAGE_ANSWER: data}))
        return outputs

    def _run(self, net: Net, pixels: Array, number: int) -> Array:
        if net.artefact.tile != (0, 0):
            return run_tiled(
                lambda part: net.infer([part])[0],
                pixels,
                Tiling.of(net.artefact),
                lambda share: report_progress(number, share),
            )
        values = net.infer([pixels])[0]
        if values.shape != pixels.shape:
            raise InferenceFailed(f"The model {net.artefact.name} returned no image of the same size.")
        return to_pixels(values)

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check that the file is an image of the size and format that the JSON says. :raises MalformedResults:"""
        data = output.data
        if not isinstance(data, dict) or data.keys() != {"width", "height", "format"}:
            raise MalformedResults("The output must have the size and the format of an image.")
        width, height, format = data["width"], data["height"], data["format"]
        if not all(type(side) is int and 1 <= side <= MAX_SIDE for side in (width, height)):
            raise MalformedResults("The width and the height must be those of an image.")
        if width % artefact.scale or height % artefact.scale:
            raise MalformedResults(f"The size of the image must be a multiple of {artefact.scale} pixels.")
        # A PNG that would be too large becomes a JPEG.
        if format not in (params["format"], "jpeg"):
            raise MalformedResults("The image has another format than was asked for.")
        check_image(output.files[IMAGE_ANSWER], width=width, height=height, format=format)

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Compare the pixels; see `compare_images`."""
        if expected.data != output.data:
            return Difference(largest=1.0, is_same_order=False)
        if IMAGE_ANSWER not in expected.files:
            return Difference(largest=0.0, is_same_order=True)
        return compare_images(expected.files[IMAGE_ANSWER], output.files[IMAGE_ANSWER])

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return all of it."""
        return output


def _mix(pixels: Array, changed: Array, amount: float) -> Array:
    """Mix the changed image with the original, enlarged as much."""
    import numpy as np
    import PIL.Image

    if amount == 1:
        return changed
    result = PIL.Image.fromarray(changed)
    original = PIL.Image.fromarray(pixels)
    if original.size != result.size:
        original = original.resize(result.size, PIL.Image.Resampling.BICUBIC)
    return np.asarray(PIL.Image.blend(original, result, amount))
