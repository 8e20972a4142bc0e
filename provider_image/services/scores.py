"""Answers that several services give: labels with their probabilities, or a number.

Used by the services `table` and `text`, and for its number by `regression`. Labels are shown, checked and compared as
those of a classification.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from provider_image.errors import InferenceFailed, MalformedResults
from provider_image.models.artefact import Artefact
from provider_image.service import Difference, Output
from provider_image.services.classification import TOP_LABELS, Classification, top_labels

if TYPE_CHECKING:
    import numpy as np

#: Numbers of the backend linear are rounded to so many digits: two correct machines differ by about 1e-15 of the terms
#: of a sum.
DIGITS = 8
#: The JSON Schema of labels, and of a number.
LABELS_SCHEMA: Mapping[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": TOP_LABELS,
    "description": "labels, most probable first",
    "items": {
        "type": "array",
        "prefixItems": [
            {"type": "string", "description": "label"},
            {"type": "number", "minimum": 0, "maximum": 1, "description": "probability"},
        ],
        "minItems": 2,
        "maxItems": 2,
    },
}
VALUE_SCHEMA: Mapping[str, Any] = {"type": "number", "description": "the number of a regression"}
_SERVICE = Classification()


def round_number(number: float, digits: int = DIGITS) -> float:
    """Round a number to some digits."""
    return float(f"{number:.{digits}g}")


def make_labels(artefact: Artefact, probabilities: np.ndarray[Any, Any]) -> list[list[Any]]:
    """Return [label, probability] of the most probable labels. :raises InferenceFailed: they are no probabilities."""
    import numpy as np

    if probabilities.shape != (len(artefact.labels),) or not bool(np.isfinite(probabilities).all()):
        raise InferenceFailed(f"The model {artefact.name} did not return {len(artefact.labels)} finite numbers.")
    return [row[1:] for row in top_labels(artefact.labels, probabilities)]


def make_value(artefact: Artefact, numbers: np.ndarray[Any, Any], digits: int = DIGITS) -> float:
    """Return the number of a regression. :raises InferenceFailed: it is not one finite number."""
    if numbers.shape != (1,) or not math.isfinite(float(numbers[0])):
        raise InferenceFailed(f"The model {artefact.name} did not return one finite number.")
    return round_number(float(numbers[0]), digits)


def check_labels(artefact: Artefact, rows: Any) -> None:
    """Check labels that a provider sent. :raises MalformedResults:"""
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 2 for row in rows):
        raise MalformedResults("The labels must be rows of [label, probability].")
    _SERVICE.check_output(artefact, {}, _as_classification(rows))


def check_value(data: Any) -> None:
    """Check an answer that is a number alone. :raises MalformedResults:"""
    if not isinstance(data, dict) or data.keys() != {"value"}:
        raise MalformedResults("The answer must have a value.")
    check_number(data["value"])


def check_number(value: Any) -> None:
    """Check a number that a provider sent. :raises MalformedResults:"""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:  # also refuses nan
        raise MalformedResults("The value must be a finite number.")


def compare_labels(expected: list[Any], rows: list[Any], tolerance: float) -> Difference:
    """Compare labels as a classification does."""
    return _SERVICE.compare(_as_classification(expected), _as_classification(rows), tolerance)


def compare_numbers(expected: float, value: float) -> Difference:
    """Return the difference of two numbers; of those beyond 1, as a share of the expected one."""
    scale = max(1.0, abs(expected))
    return Difference(largest=abs(expected - value) / scale, scale=scale, is_same_order=True)


def _as_classification(rows: list[Any]) -> Output:
    return Output(data=[[row[0], *row] for row in rows])
