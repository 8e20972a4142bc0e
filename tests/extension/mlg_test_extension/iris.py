"""The service `iris`: the species of an iris from its measures. Its input is a row of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from provider_image.backends import Device, Net, load_net
from provider_image.errors import MalformedResults, NotARow
from provider_image.models.artefact import Artefact
from provider_image.rows import check_columns, parse_row
from provider_image.service import Difference, Input, Output, OutputFile, Param


class Iris:
    """See `provider_image.service.Service`."""

    name = "iris"
    title = "Iris"
    help = "Tells the species of an iris."
    inputs: Mapping[str, Input] = {
        "row": Input(
            kind="row",
            help="The measures in centimetres.",
            media_types=("application/json",),
            max_bytes=1000,
        ),
        "note": Input(
            kind="file", help="Returned with the answer.", media_types=("text/plain",), max_bytes=1000, is_optional=True
        ),
    }
    params: tuple[Param, ...] = ()
    outputs: Mapping[str, OutputFile] = {
        "note.txt": OutputFile(help="The note.", media_type="text/plain", max_bytes=1000, is_optional=True)
    }
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["species", "probability"],
        "properties": {"species": {"type": "string"}, "probability": {"type": "number", "minimum": 0, "maximum": 1}},
    }
    example: Mapping[str, Any] = {"species": "setosa", "probability": 0.97}

    def load(self, artefact: Artefact, device: Device) -> Net:
        return load_net(artefact, device)

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> Any:
        row = parse_row(inputs["row"])
        check_columns(row, artefact.columns)
        values = [row[column] for column in artefact.columns]
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise NotARow("The measures must be numbers.")
        return values, inputs.get("note")

    def run(self, net: Net, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        import numpy as np

        outputs = []
        for scores, (_, note) in zip(net.infer([np.array(values) for values, _ in items]), items, strict=True):
            weights = np.exp(scores - scores.max())
            best = int(weights.argmax())
            data = {
                "species": net.artefact.labels[best][1],
                "probability": round(float(weights[best] / weights.sum()), 6),
            }
            outputs.append(Output(data=data, files={} if note is None else {"note.txt": note}))
        return outputs

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        data = output.data
        if not isinstance(data, dict) or data.keys() != {"species", "probability"}:
            raise MalformedResults("The output must have a species and a probability.")
        is_probability = isinstance(data["probability"], float) and 0 <= data["probability"] <= 1
        if not is_probability or data["species"] not in [name for _, name in artefact.labels]:
            raise MalformedResults("The species or the probability is impossible.")

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        gap = abs(expected.data["probability"] - output.data["probability"])
        is_same = expected.data["species"] == output.data["species"]
        return Difference(largest=gap if math.isfinite(gap) else 1.0, is_same_order=is_same)

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        return output
