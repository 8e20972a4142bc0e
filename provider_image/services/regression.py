"""The service `regression`: one number for one image, such as a rating.

The graph takes uint8 RGB and returns one number in the unit of the numbers that the model learned from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.service import Difference, Output, OutputFile, Param
from provider_image.services.one_image import OneImage
from provider_image.services.scores import VALUE_SCHEMA, check_value, compare_numbers, make_value

if TYPE_CHECKING:
    from provider_image.backends import Net
    from provider_image.models.artefact import Artefact

#: Values are rounded to this many digits: two correct machines differ in the last of them.
_DIGITS = 7


class Regression(OneImage):
    """See `provider_image.service.Service`."""

    name = "regression"
    title = "Regression"
    help = "Rates an image: one number, in the unit of the numbers that the model learned from."
    params: tuple[Param, ...] = ()
    outputs: Mapping[str, OutputFile] = {}
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["value"],
        "properties": {"value": VALUE_SCHEMA},
    }
    example: Mapping[str, Any] = {"value": 3.72}

    def run(self, net: Net, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        """Rate decoded images. :raises InferenceFailed: the net did not return one finite number for each."""
        return [Output(data={"value": make_value(net.artefact, values, _DIGITS)}) for values in net.infer(items)]

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check that it is one finite number. :raises MalformedResults:"""
        check_value(output.data)

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Compare the numbers."""
        return compare_numbers(expected.data["value"], output.data["value"])

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return all of it."""
        return output
