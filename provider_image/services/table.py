"""The service `table`: a class or a number for a row of a table.

A model is trained by `trainer/tables.py`. It takes the features of a row, see `provider_image/features/table.py`, and
has either labels or gives one number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.features import load_table_features
from provider_image.rows import check_columns, parse_row
from provider_image.service import Difference, Input, Output, OutputFile, Param
from provider_image.services.classification import TOP
from provider_image.services.scores import (
    LABELS_SCHEMA,
    VALUE_SCHEMA,
    check_labels,
    check_value,
    compare_labels,
    compare_numbers,
    make_labels,
    make_value,
)

if TYPE_CHECKING:
    from provider_image.backends import Device, Net
    from provider_image.models.artefact import Artefact

#: Most bytes of a row.
MAX_ROW_BYTES = 64 * 1024


class Table:
    """See `provider_image.service.Service`."""

    name = "table"
    title = "Table"
    help = "Answers a row of a table with labels and their probabilities, or with a number."
    inputs: Mapping[str, Input] = {
        "row": Input(
            kind="row",
            help="The row: a JSON object with a number or a text for each column of the model, null for a missing one.",
            media_types=("application/json",),
            max_bytes=MAX_ROW_BYTES,
        )
    }
    params: tuple[Param, ...] = (TOP,)
    outputs: Mapping[str, OutputFile] = {}
    #: A list of labels, or an object with a number.
    output_schema: Mapping[str, Any] = {
        **LABELS_SCHEMA,
        "type": ["array", "object"],
        "required": ["value"],
        "properties": {"value": VALUE_SCHEMA},
    }
    example: Any = (("good", 0.93), ("bad", 0.07))

    def load(self, artefact: Artefact, device: Device) -> Net:
        """Load the model."""
        from provider_image.backends import load_net

        return load_net(artefact, device)

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> Any:
        """Compute the features of the row."""
        features, row = load_table_features(artefact), parse_row(inputs["row"])
        check_columns(row, features.names)
        return features.vector(row)

    def run(self, net: Net, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        """Answer rows. :raises InferenceFailed: the net did not return probabilities or a number."""
        artefact = net.artefact
        found = net.infer(items)
        if artefact.labels:
            return [Output(data=make_labels(artefact, each)) for each in found]
        return [Output(data={"value": make_value(artefact, each)}) for each in found]

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check that the labels are the model's, or that there is a number. :raises MalformedResults:"""
        if artefact.labels:
            check_labels(artefact, output.data)
        else:
            check_value(output.data)

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Compare the probabilities, or the numbers."""
        if isinstance(expected.data, list):
            return compare_labels(expected.data, output.data, tolerance)
        return compare_numbers(expected.data["value"], output.data["value"])

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return the first `top` labels, or the number."""
        return output[: int(params.get("top", TOP.default))] if isinstance(output, list) else output
