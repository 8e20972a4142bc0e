"""The service `text`: labels or a number for a text, and the words that decided it.

A model is trained by `trainer/texts.py`. It takes the features of a text, see `provider_image/features/text.py`, and is
linear: what each term adds to the answer is known exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.errors import BrokenArtefact, MalformedResults
from provider_image.features import load_text_features
from provider_image.features.text import parse_text
from provider_image.service import Difference, Input, Output, OutputFile, Param
from provider_image.services.classification import TOP
from provider_image.services.scores import (
    LABELS_SCHEMA,
    VALUE_SCHEMA,
    check_labels,
    check_number,
    compare_labels,
    compare_numbers,
    make_labels,
    make_value,
    round_number,
)

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Device
    from provider_image.backends.linear import LinearNet
    from provider_image.models.artefact import Artefact

    Array = np.ndarray[Any, Any]

#: Most bytes of a text.
MAX_TEXT_BYTES = 32 * 1024
#: Words in an answer.
TOP_WORDS = 8


class Text:
    """See `provider_image.service.Service`."""

    name = "text"
    title = "Text"
    help = "Answers a text with labels and their probabilities, or with a number, and the words that decided it."
    inputs: Mapping[str, Input] = {
        "text": Input(
            kind="text",
            help="The text: a sentence or some paragraphs, as UTF-8.",
            media_types=("text/plain",),
            max_bytes=MAX_TEXT_BYTES,
        )
    }
    params: tuple[Param, ...] = (TOP,)
    outputs: Mapping[str, OutputFile] = {}
    #: It has labels or a value.
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["words"],
        "properties": {
            "labels": LABELS_SCHEMA,
            "value": VALUE_SCHEMA,
            "words": {
                "type": "array",
                "maxItems": TOP_WORDS,
                "description": "what decided it, strongest first",
                "items": {
                    "type": "array",
                    "prefixItems": [
                        {"type": "string", "description": "words in the text, in lower case"},
                        {
                            "type": "number",
                            "description": "what they add to the value, or to the logarithm of the first label's odds "
                            "against the mean of the others; negative if they speak against it",
                        },
                    ],
                    "minItems": 2,
                    "maxItems": 2,
                },
            },
        },
    }
    example: Mapping[str, Any] = {
        "labels": (("positive", 0.91), ("negative", 0.09)),
        "words": (("wonderful", 1.72), ("slow", -0.41)),
    }

    def load(self, artefact: Artefact, device: Device) -> LinearNet:
        """Load the model and what cuts its texts into words. :raises NotInstalled: the latter is not installed here."""
        from provider_image.backends import linear

        if artefact.backend != "linear":
            raise BrokenArtefact(f"The service text runs models of the backend linear, not of {artefact.backend[:64]}.")
        load_text_features(artefact).prepare()
        return linear.load_net(artefact, device)

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> Any:
        """Compute the features of the text that are not 0."""
        return load_text_features(artefact).vector(parse_text(inputs["text"]))

    def run(self, net: Any, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        """Answer texts. :raises InferenceFailed: the net did not return probabilities or a number."""
        import numpy as np

        artefact, terms = net.artefact, load_text_features(net.artefact).terms
        vectors = np.zeros((len(items), len(terms)))
        for vector, (places, values) in zip(vectors, items, strict=True):
            vector[places] = values
        outputs = []
        for numbers, (places, values) in zip(net.infer(vectors), items, strict=True):
            if artefact.labels:
                data: dict[str, Any] = {"labels": make_labels(artefact, numbers)}
            else:
                data = {"value": make_value(artefact, numbers)}
            found = zip(places.tolist(), (values * _influence(net.weights[places], numbers)).tolist(), strict=True)
            best = sorted((one for one in found if one[1]), key=lambda one: (-abs(one[1]), one[0]))
            data["words"] = [[terms[place], round_number(number)] for place, number in best[:TOP_WORDS]]
            outputs.append(Output(data=data))
        return outputs

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check the labels or the number, and that the words are the model's. :raises MalformedResults:"""
        answer = "labels" if artefact.labels else "value"
        data = output.data
        if not isinstance(data, dict) or data.keys() != {answer, "words"}:
            raise MalformedResults(f"The answer must have {answer} and words.")
        if artefact.labels:
            check_labels(artefact, data["labels"])
        else:
            check_number(data["value"])
        words, known = data["words"], load_text_features(artefact).places
        if not isinstance(words, list) or len(words) > TOP_WORDS:
            raise MalformedResults(f"There must be at most {TOP_WORDS} words.")
        previous = float("inf")
        for word in words:
            if not isinstance(word, list) or len(word) != 2 or not isinstance(word[0], str) or word[0] not in known:
                raise MalformedResults("A word is not one of the model's.")
            check_number(word[1])
            if abs(word[1]) > previous:
                raise MalformedResults("The words must be in the order of what they add.")
            previous = abs(word[1])
        if len({word for word, _ in words}) != len(words):
            raise MalformedResults("A word occurs twice.")

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Compare the probabilities or the numbers, and what the words add, as a share of the strongest."""
        if "labels" in expected.data:
            found = compare_labels(expected.data["labels"], output.data["labels"], tolerance)
            if expected.data["labels"][0][0] != output.data["labels"][0][0]:
                return found  # the words speak for another label, so what they add cannot be compared
        else:
            found = compare_numbers(expected.data["value"], output.data["value"])
        one, other = (dict(each.data["words"]) for each in (expected, output))
        strongest = max((abs(number) for number in (*one.values(), *other.values())), default=0.0)
        # A word that is not in a full list adds at most as much as the last of it.
        floors = [min(map(abs, words.values())) if len(words) == TOP_WORDS else 0.0 for words in (one, other)]
        gaps = [abs(number - other[word]) if word in other else abs(number) - floors[1] for word, number in one.items()]
        gaps += [abs(number) - floors[0] for word, number in other.items() if word not in one]
        largest = max([found.largest, *(gap / strongest for gap in gaps if gap > 0)])
        return Difference(largest=largest, scale=found.scale, is_same_order=found.is_same_order)

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return the first `top` labels, or the number, and the words."""
        if "labels" not in output:
            return output
        return {**output, "labels": output["labels"][: int(params.get("top", TOP.default))]}


def _influence(weights: Array, numbers: Array) -> Array:
    """Return what one unit of each feature adds to the answer.

    :param weights: shape (features, outputs).
    :param numbers: what the net returned, shape (outputs,).
    """
    import numpy as np

    if weights.shape[1] == 1:
        return np.asarray(weights[:, 0])
    best = int(numbers.argmax())
    others = (weights.sum(axis=1) - weights[:, best]) / (weights.shape[1] - 1)
    return np.asarray(weights[:, best] - others)
