"""The service `blend`: mixes two images, step by step. Its answer is an image, and it reports progress."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

from provider_image.backends import Device, Net, load_net
from provider_image.errors import MalformedResults
from provider_image.images.headers import read_header
from provider_image.images.resizing import load_image
from provider_image.models.artefact import Artefact
from provider_image.progress import report_progress
from provider_image.service import IMAGE_ANSWER, IMAGE_INPUT, Difference, Input, Output, OutputFile, Param

FORMATS = {"png": "PNG", "jpeg": "JPEG"}


class Blend:
    """See `provider_image.service.Service`."""

    name = "blend"
    title = "Blend"
    help = "Mixes an image with another one."
    inputs: Mapping[str, Input] = {"image": IMAGE_INPUT, "style": IMAGE_INPUT}
    params = (
        Param(name="share", kind="number", default=0.5, minimum=0, maximum=1, help="Share of the second image."),
        Param(name="steps", kind="whole", default=1, minimum=1, maximum=500, help="Number of steps."),
        Param(name="pause", kind="number", default=0.0, minimum=0, maximum=1, help="Seconds between two steps."),
        Param(name="format", kind="choice", default="png", choices=tuple(FORMATS), help="Format of the answer."),
    )
    outputs: Mapping[str, OutputFile] = {
        IMAGE_ANSWER: OutputFile(help="The mixed image.", media_type="image/*", max_bytes=1_000_000)
    }
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["width", "height", "params"],
        "properties": {
            **{name: {"type": "integer", "minimum": 1} for name in ("width", "height")},
            "params": {"type": "object", "properties": {}},
        },
    }
    example: Mapping[str, Any] = {"width": 96, "height": 64, "params": {"steps": 1}}

    def load(self, artefact: Artefact, device: Device) -> Net:
        return load_net(artefact, device)

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> Any:
        return [load_image(inputs[name], artefact, is_resized=is_resized) for name in self.inputs]

    def run(self, net: Net, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        outputs = []
        for number, ((image, style), each) in enumerate(zip(items, params, strict=True)):
            mixed = image
            for step in range(each["steps"]):
                part = each["share"] * (step + 1) / each["steps"]
                mixed = (image * (1 - part) + style * part).round().astype("uint8")
                report_progress(number, (step + 1) / each["steps"], lambda mixed=mixed: _encode(mixed, "JPEG"))
                if step + 1 < each["steps"]:
                    time.sleep(each["pause"])
            height, width, _ = mixed.shape
            data = {"width": width, "height": height, "params": dict(each)}
            outputs.append(Output(data=data, files={IMAGE_ANSWER: _encode(mixed, FORMATS[each["format"]])}))
        return outputs

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        header = read_header(output.files[IMAGE_ANSWER], 1_000_000)
        expected = {"width": header.width, "height": header.height, "params": params}
        if output.data != expected or header.format != FORMATS[params["format"]]:
            raise MalformedResults("The output has another size or format than it should.")

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        is_same = expected.data == output.data and (not expected.files or expected.files == output.files)
        return Difference(largest=0.0 if is_same else 1.0, is_same_order=is_same)

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        return output


def _encode(pixels: Any, format: str) -> bytes:
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format)
    return file.getvalue()
