"""The service `style_transfer`: two images in, the first in the style of the second out.

The models are those of the backend `style`. An image takes seconds, so the service reports how far it is, and a chunk
has one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from provider_image.errors import BadInput, MalformedResults
from provider_image.images.outputs import FORMAT, IMAGE_OUTPUT, check_image, encode_image
from provider_image.progress import report_progress
from provider_image.schemas import MAX_BYTES
from provider_image.service import IMAGE_ANSWER, IMAGE_INPUT, Difference, Input, Output, OutputFile, Param

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Device, Net
    from provider_image.backends.style import StyleNet
    from provider_image.models.artefact import Artefact

    Array = np.ndarray[Any, Any]

#: The inputs.
IMAGE, STYLE = "image", "style"
#: Longest side of an answer, and most iterations.
_MAX_SIDE, _MAX_ITERATIONS = 1024, 500
#: Two correct machines may give images that differ by this much, as the root of the mean square of the differences, as
#: a share of 255: with the method `gradient`, every rounding is carried through all iterations. With AVX512 and with
#: AVX2 it differed by 0.009. What is less counts as no difference.
SAME_WITHIN = 0.03
_FIELDS = {"width", "height", "iterations", "complete"}


@dataclass(frozen=True, kw_only=True)
class StylePair:
    """Two decoded images, uint8 RGB of shape (height, width, 3)."""

    content: Array
    style: Array


class StyleTransfer:
    """See `provider_image.service.Service`."""

    name = "style_transfer"
    title = "Style transfer"
    help = "Gives an image the style of another one, and returns an image."
    #: A chunk has one item; see `provider_image.services.chunk_items`.
    chunk_items = 1
    inputs: Mapping[str, Input] = {
        IMAGE: IMAGE_INPUT,
        STYLE: Input(
            kind="image",
            help="The image whose style it gets: JPEG, PNG, WebP, GIF, BMP or TIFF.",
            media_types=("image/*",),
            max_bytes=MAX_BYTES,
        ),
    }
    params = (
        Param(
            name="strength",
            kind="number",
            default=0.5,
            minimum=0,
            maximum=1,
            help="How much of the style it gets: 0 leaves nearly the image, 1 leaves little of it.",
        ),
        Param(
            name="detail",
            kind="number",
            default=1,
            minimum=0.25,
            maximum=2,
            help="Size of the style's details: with 2 they are twice as large as in a style image of the same size.",
        ),
        Param(
            name="keep_colours",
            kind="choice",
            default="yes",
            choices=("yes", "no"),
            help="Whether the image keeps its colours or takes those of the style.",
        ),
        Param(
            name="size",
            kind="whole",
            default=384,
            minimum=32,
            maximum=_MAX_SIDE,
            help="Longest side of the answer in pixels; images are not enlarged, and a model may allow less.",
        ),
        Param(
            name="iterations",
            kind="whole",
            default=0,
            minimum=0,
            maximum=_MAX_ITERATIONS,
            help="Steps of the optimisation: more take longer. 0 takes the model's own number.",
        ),
        Param(
            name="seconds",
            kind="number",
            default=90,
            minimum=0.1,
            maximum=3600,
            is_time_limit=True,
            help="Seconds after which it stops and answers with what it has; at most three quarters of a chunk's time.",
        ),
        FORMAT,
    )
    outputs: Mapping[str, OutputFile] = {IMAGE_ANSWER: IMAGE_OUTPUT}
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": sorted(_FIELDS),
        "properties": {
            "width": {"type": "integer", "minimum": 1, "description": "width of the image in pixels"},
            "height": {"type": "integer", "minimum": 1, "description": "height of the image in pixels"},
            "iterations": {"type": "integer", "minimum": 0, "description": "iterations that were made"},
            "complete": {"type": "boolean", "description": "false if the time ended before the iterations"},
        },
    }
    example: Mapping[str, Any] = {"width": 384, "height": 288, "iterations": 192, "complete": True}

    def load(self, artefact: Artefact, device: Device) -> Net:
        """Load the artefact."""
        from provider_image.backends import load_net

        return load_net(artefact, device)

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> StylePair:
        """Decode both images. :raises BadInput: one cannot be used, or is too narrow."""
        from provider_image.backends.style import read_settings
        from provider_image.style.pixels import load_pixels

        if is_resized:
            raise BadInput("The images of a style transfer are not resized before they are sent.")
        max_pixels = read_settings(artefact).max_pixels
        content = load_pixels(inputs[IMAGE], params["size"], max_pixels)
        try:
            # Large details are those of a large style image.
            style_side = math.ceil(params["detail"] * max(content.shape))
            style = load_pixels(inputs[STYLE], style_side, max_pixels)
        except BadInput as error:
            raise type(error)(f"The style: {error.reason}") from error
        return StylePair(content=content, style=style)

    def run(self, net: Net, items: Sequence[StylePair], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        """Transfer the style in each pair. :raises InferenceFailed: OpenVINO fails."""
        return [
            self._transfer(cast("StyleNet", net), number, pair, each)
            for number, (pair, each) in enumerate(zip(items, params, strict=True))
        ]

    def _transfer(self, net: StyleNet, number: int, pair: StylePair, params: Mapping[str, Any]) -> Output:
        from provider_image.style.optimising import TransferOptions
        from provider_image.style.pixels import encode_preview

        def report(fraction: float, image: Callable[[], Array]) -> None:
            report_progress(number, fraction, lambda: encode_preview(image()))

        iterations = params["iterations"] or net.settings.iterations
        image, done = net.transfer(
            pair.content,
            pair.style,
            TransferOptions(
                strength=params["strength"],
                keeps_colours=params["keep_colours"] == "yes",
                iterations=iterations,
                seconds=params["seconds"],
                on_step=report,
            ),
        )
        height, width, _ = image.shape
        data = {"width": width, "height": height, "iterations": done, "complete": done == iterations}
        return Output(data=data, files={IMAGE_ANSWER: encode_image(image, params["format"])})

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check that the image has the size and the format that were asked for. :raises MalformedResults:"""
        from provider_image.backends.style import read_settings

        data = output.data
        if not isinstance(data, dict) or data.keys() != _FIELDS or type(data["complete"]) is not bool:
            raise MalformedResults("The output of a style transfer must have width, height, iterations and complete.")
        if any(type(data[name]) is not int for name in ("width", "height", "iterations")):
            raise MalformedResults("The numbers of the output must be whole.")
        settings = read_settings(artefact)
        wanted = params["iterations"] or settings.iterations
        if not 0 <= data["iterations"] <= wanted or data["complete"] != (data["iterations"] == wanted):
            raise MalformedResults(f"The output says {data['iterations']} of {wanted} iterations.")
        width, height = data["width"], data["height"]
        if not (max(width, height) <= params["size"] and width * height <= settings.max_pixels):
            raise MalformedResults(f"The output says {width} x {height} pixels, which is not what was asked for.")
        check_image(output.files[IMAGE_ANSWER], width=width, height=height, format=params["format"])

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Return by how much more the pixels differ than those of two correct machines, see SAME_WITHIN.

        Answers with other sizes or iterations, for example because one machine was too slow, cannot be compared: then
        it is 1.
        """
        import numpy as np

        from provider_image.style.pixels import load_pixels, to_floats

        if expected.data != output.data:
            return Difference(largest=1.0, is_same_order=False)
        if not expected.files:
            return Difference(largest=0.0, is_same_order=True)
        try:
            one, other = (
                to_floats(load_pixels(each.files[IMAGE_ANSWER], _MAX_SIDE, _MAX_SIDE**2)) for each in (expected, output)
            )
        except (BadInput, KeyError):
            return Difference(largest=1.0, is_same_order=False)
        if one.shape != other.shape:
            return Difference(largest=1.0, is_same_order=False)
        difference = float(np.sqrt(np.mean(np.square(one - other), dtype=np.float64)))
        return Difference(largest=max(0.0, difference - SAME_WITHIN), is_same_order=True)

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return all of it."""
        return output
