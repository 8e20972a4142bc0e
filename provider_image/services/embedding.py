"""The service `embedding`: one image in, a vector out that is close to those of similar images.

The graph takes uint8 RGB and returns a vector of unit length: what a classifier computes before its last layer. The
answer is a file of little-endian 32-bit floats, because a vector as JSON has four times as many bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.errors import InferenceFailed, MalformedResults
from provider_image.service import Difference, Output, OutputFile, Param
from provider_image.services.one_image import OneImage

if TYPE_CHECKING:
    from provider_image.backends import Net
    from provider_image.models.artefact import Artefact

#: Most values of a vector.
MAX_DIMENSIONS = 16_384
#: The output file, and the bytes of a value in it.
VECTOR = "vector"
_VALUE_BYTES = 4
#: How far the length of a vector may be from 1. In f32 it is some 1e-7, in bf16 some 1e-4.
_LENGTH_TOLERANCE = 1e-3


class Embedding(OneImage):
    """See `provider_image.service.Service`."""

    name = "embedding"
    title = "Embedding"
    help = "Turns an image into a vector of unit length: the more alike two images are, the larger the dot product."
    params: tuple[Param, ...] = ()
    outputs: Mapping[str, OutputFile] = {
        VECTOR: OutputFile(
            help="The vector: `dimensions` little-endian 32-bit floats.",
            media_type="application/octet-stream",
            max_bytes=MAX_DIMENSIONS * _VALUE_BYTES,
        )
    }
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["dimensions"],
        "properties": {
            "dimensions": {
                "type": "integer",
                "minimum": 1,
                "maximum": MAX_DIMENSIONS,
                "description": "number of values of the vector",
            }
        },
    }
    example: Mapping[str, Any] = {"dimensions": 1280}

    def run(self, net: Net, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        """Compute the vectors of decoded images. :raises InferenceFailed: the net did not return vectors."""
        artefact, outputs = net.artefact, []
        for values in net.infer(items):
            output = Output(data={"dimensions": values.size}, files={VECTOR: values.astype("<f4").tobytes()})
            try:
                self.check_output(artefact, {}, output)
            except MalformedResults as error:
                raise InferenceFailed(f"The model {artefact.name} returned no vector: {error.reason}") from error
            outputs.append(output)
        return outputs

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check that the vector has the model's dimensions and unit length. :raises MalformedResults:"""
        data = output.data
        if not isinstance(data, dict) or data.keys() != {"dimensions"} or type(data["dimensions"]) is not int:
            raise MalformedResults("The output of an embedding must be its number of dimensions.")
        expected_bytes = artefact.dimensions * _VALUE_BYTES
        if data["dimensions"] != artefact.dimensions or len(output.files[VECTOR]) != expected_bytes:
            raise MalformedResults(f"The vector must have {artefact.dimensions} values of {_VALUE_BYTES} bytes.")
        length = math.hypot(*read_vector(output.files[VECTOR]))  # not finite if a value is not
        if not abs(length - 1) <= _LENGTH_TOLERANCE:
            raise MalformedResults(f"The vector must have finite values and the length 1, not {length:.6g}.")

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Return the length of the difference of both vectors: 0 if they are equal, at most 2."""
        one, other = (read_vector(each.files.get(VECTOR, b"")) for each in (expected, output))
        is_comparable = 0 < len(one) == len(other)
        return Difference(largest=math.dist(one, other) if is_comparable else 2.0, is_same_order=is_comparable)

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return all of it."""
        return output


def read_vector(data: bytes) -> tuple[float, ...]:
    """Read a file of little-endian 32-bit floats. Without numpy, which would take longer to import than all this."""
    return struct.unpack(f"<{len(data) // _VALUE_BYTES}f", data)
