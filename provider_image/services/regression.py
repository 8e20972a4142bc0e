"""The service `regression`: one number for one image, such as a rating.

The graph takes uint8 RGB and returns one number in the unit of the numbers that the model learned from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.errors import InferenceFailed, MalformedResults
from provider_image.images.resizing import load_image
from provider_image.service import IMAGE_INPUT, Difference, Input, Output, OutputFile, Param

if TYPE_CHECKING:
    from provider_image.backends import Device, Net
    from provider_image.models.artefact import Artefact

#: Values are rounded to this many digits: two correct machines differ in the last of them.
_DIGITS = 7
#: Largest number of 32-bit floats; also refuses infinite ones and whole numbers that no float can hold.
_MAX_VALUE = 3.4028234663852886e38


class Regression:
    """See `provider_image.service.Service`."""

    name = "regression"
    title = "Regression"
    help = "Rates an image: one number, in the unit of the numbers that the model learned from."
    inputs: Mapping[str, Input] = {"image": IMAGE_INPUT}
    params: tuple[Param, ...] = ()
    outputs: Mapping[str, OutputFile] = {}
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["value"],
        "properties": {"value": {"type": "number", "description": "the number"}},
    }
    example: Mapping[str, Any] = {"value": 3.72}

    def load(self, artefact: Artefact, device: Device) -> Net:
        """Load the artefact's graph."""
        from provider_image.backends import load_net

        return load_net(artefact, device)

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> Any:
        """Decode the image to the model's input size."""
        return load_image(inputs["image"], artefact, is_resized=is_resized)

    def run(self, net: Net, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        """Rate decoded images. :raises InferenceFailed: the net did not return one finite number for each."""
        outputs = []
        for values in net.infer(items):
            if values.shape != (1,) or not math.isfinite(values[0]):
                raise InferenceFailed(f"The model {net.artefact.name} did not return one finite number.")
            outputs.append(Output(data={"value": float(f"{float(values[0]):.{_DIGITS}g}")}))
        return outputs

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check that it is one finite number. :raises MalformedResults:"""
        data = output.data
        if not isinstance(data, dict) or data.keys() != {"value"}:
            raise MalformedResults("The output of a regression must be its value.")
        value = data["value"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_VALUE:
            raise MalformedResults("The value must be a finite number.")

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Return the difference of the values; of numbers beyond 1, as a share of the expected one."""
        one, other = expected.data["value"], output.data["value"]
        return Difference(largest=abs(one - other) / max(1.0, abs(one)), is_same_order=True)

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return all of it."""
        return output
