"""The service `classification`: the most probable labels of one image.

The graph takes uint8 RGB and returns probabilities (preprocessing and softmax are part of it), so every classifier is
run in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.errors import InferenceFailed, MalformedResults
from provider_image.service import Difference, Output, OutputFile, Param
from provider_image.services.one_image import OneImage

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Net
    from provider_image.models.artefact import Artefact

#: Number of labels in an output; fewer if the model has fewer.
TOP_LABELS = 20
#: Probabilities are rounded to this many decimals: two correct machines differ by about 1e-6.
_DECIMALS = 6


#: The parameter that says how many labels are shown.
TOP = Param(
    name="top",
    kind="whole",
    default=5,
    minimum=1,
    maximum=TOP_LABELS,
    help="Number of labels to return, most probable first.",
    is_read_time=True,
)


class Classification(OneImage):
    """See `provider_image.service.Service`."""

    name = "classification"
    title = "Classification"
    help = "Classifies an image: labels of the model's classes with their probabilities, most probable first."
    params = (TOP,)
    outputs: Mapping[str, OutputFile] = {}
    output_schema: Mapping[str, Any] = {
        "type": "array",
        "minItems": 1,
        "maxItems": TOP_LABELS,
        "items": {
            "type": "array",
            "prefixItems": [
                {"type": "string", "description": "WordNet id"},
                {"type": "string", "description": "label"},
                {"type": "number", "minimum": 0, "maximum": 1, "description": "probability"},
            ],
            "minItems": 3,
            "maxItems": 3,
        },
    }
    example: Any = (
        ("n02123159", "tiger_cat", 0.408),
        ("n02124075", "Egyptian_cat", 0.34),
        ("n02123045", "tabby", 0.167),
        ("n02127052", "lynx", 0.015),
        ("n04589890", "window_screen", 0.001),
    )

    def run(self, net: Net, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        """Classify decoded images. :raises InferenceFailed: the net did not return probabilities."""
        import numpy as np

        labels = net.artefact.labels
        outputs = []
        for probabilities in net.infer(items):
            if probabilities.shape != (len(labels),) or not bool(np.isfinite(probabilities).all()):
                raise InferenceFailed(f"The model {net.artefact.name} did not return {len(labels)} finite numbers.")
            outputs.append(Output(data=top_labels(labels, probabilities)))
        return outputs

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check that the labels are the model's, each once, with descending probabilities. :raises MalformedResults:"""
        expected, rows = min(TOP_LABELS, len(artefact.labels)), output.data
        if not isinstance(rows, list) or len(rows) != expected:
            raise MalformedResults(f"A classification must have {expected} rows.")
        if not all(isinstance(row, list) and len(row) == 3 for row in rows):
            raise MalformedResults("A row of a classification must be [wnid, name, probability].")
        if not all(isinstance(row[0], str) and isinstance(row[1], str) for row in rows):
            raise MalformedResults("A label must be text.")
        seen = {(row[0], row[1]) for row in rows}
        if len(seen) != expected or not seen.issubset(_label_set(artefact)):
            raise MalformedResults("A label occurs twice or is not one of the model's.")
        previous, total = 1.0, 0.0
        for row in rows:
            probability = row[2]
            if isinstance(probability, bool) or not isinstance(probability, int | float):
                raise MalformedResults("A probability must be a number.")
            if not 0.0 <= probability <= previous:  # also refuses nan
                raise MalformedResults("Probabilities must be between 0 and 1 and in descending order.")
            previous = float(probability)
            total += previous
        if total > 1.001:
            raise MalformedResults("Probabilities must not sum to more than 1.")

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return the first `top` rows."""
        return output[: int(params.get("top", 5))]

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Compare the probabilities of the labels in either output, and the order of the top five."""
        rows, other_rows = expected.data, output.data
        one, other = ({(row[0], row[1]): row[2] for row in each} for each in (rows, other_rows))
        # A label that is missing from an output is at most as probable as the last label in it.
        floor, other_floor = rows[-1][2], other_rows[-1][2]
        gaps = [abs(p - other[label]) if label in other else max(0.0, p - other_floor) for label, p in one.items()]
        gaps += [max(0.0, p - floor) for label, p in other.items() if label not in one]
        is_same_order = all(
            (row[0], row[1]) == (other_row[0], other_row[1])
            or abs(row[2] - one.get((other_row[0], other_row[1]), floor)) <= tolerance
            for row, other_row in zip(rows[:5], other_rows[:5], strict=False)
        )
        return Difference(largest=max(gaps), is_same_order=is_same_order)


def top_labels(labels: Sequence[tuple[str, str]], probabilities: np.ndarray[Any, Any]) -> list[list[Any]]:
    """Return an output: [wnid, name, probability] of the TOP_LABELS most probable labels, in descending order.

    :param probabilities: shape (len(labels),), in the labels' order.
    """
    import numpy as np

    best = np.argsort(-probabilities, kind="stable")[:TOP_LABELS]
    return [[*labels[i], min(1.0, round(float(probabilities[i]), _DECIMALS))] for i in best.tolist()]


#: Digest -> set of labels of the few artefacts in use. A cache, because it is needed for every output.
_label_sets: dict[str, frozenset[tuple[str, str]]] = {}


def _label_set(artefact: Artefact) -> frozenset[tuple[str, str]]:
    found = _label_sets.get(artefact.digest)
    if found is None:
        found = _label_sets.setdefault(artefact.digest, frozenset(artefact.labels))
    return found
