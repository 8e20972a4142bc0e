"""The service `posterise`: an image in the model's colours, with few levels of each. Its output is an image."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from provider_image.backends import Device, Net, load_net
from provider_image.errors import MalformedResults
from provider_image.images.headers import read_header
from provider_image.images.resizing import load_image
from provider_image.models.artefact import Artefact
from provider_image.service import Difference, Input, Output, OutputFile, Param

FIELDS = ("width", "height", "levels")


class Posterise:
    """See `provider_image.service.Service`."""

    name = "posterise"
    title = "Posterise"
    help = "Draws an image with few colours."
    inputs: Mapping[str, Input] = {
        "image": Input(kind="image", help="The image.", media_types=("image/*",), max_bytes=8_000_000)
    }
    params = (
        Param(name="levels", kind="whole", default=4, minimum=2, maximum=32, help="Number of levels of each colour."),
    )
    outputs: Mapping[str, OutputFile] = {
        "poster.png": OutputFile(help="The image.", media_type="image/png", max_bytes=1_000_000)
    }
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": list(FIELDS),
        "properties": {name: {"type": "integer", "minimum": 1} for name in FIELDS},
    }
    example: Mapping[str, Any] = {"width": 96, "height": 64, "levels": 4}

    def load(self, artefact: Artefact, device: Device) -> Net:
        return load_net(artefact, device)

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> Any:
        return load_image(inputs["image"], artefact, is_resized=is_resized)

    def run(self, net: Net, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        import numpy as np
        import PIL.Image

        outputs = []
        for pixels, each in zip(net.infer(items), params, strict=True):
            steps = each["levels"] - 1
            poster = np.rint(np.rint(np.clip(pixels, 0, 255) / 255 * steps) * 255 / steps).astype(np.uint8)
            file = io.BytesIO()
            PIL.Image.fromarray(poster).save(file, "PNG")
            height, width, _ = poster.shape
            data = {"width": width, "height": height, "levels": each["levels"]}
            outputs.append(Output(data=data, files={"poster.png": file.getvalue()}))
        return outputs

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        expected = {"width": artefact.width, "height": artefact.height, "levels": params["levels"]}
        if not isinstance(output.data, dict) or output.data != expected:
            raise MalformedResults(f"The output must be {expected}.")
        header = read_header(output.files["poster.png"], 1_000_000)
        if (header.width, header.height) != (artefact.width, artefact.height):
            raise MalformedResults("The poster has another size than the output says.")

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        is_same = expected.data == output.data and (not expected.files or expected.files == output.files)
        return Difference(largest=0.0 if is_same else 1.0, is_same_order=is_same)

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        return output
