"""The service `face_detection`: where the faces of one image are, and their eyes.

What finds them is in `provider_image/faces/detectors.py`. Coordinates are pixels of the original as it is shown,
upright. It says nothing about who is on the image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provider_image.errors import MalformedResults
from provider_image.faces.rows import MAX_FACES
from provider_image.images.headers import MAX_SIDE
from provider_image.service import IMAGE_INPUT, Difference, Input, Output, OutputFile, Param

if TYPE_CHECKING:
    from provider_image.backends import Device, Net
    from provider_image.images.decoding import FittedImage
    from provider_image.models.artefact import Artefact

#: Pixels by which equal boxes may differ because they are rounded.
_ROUNDING = 0.11
_COORDINATE = {"type": "number", "minimum": 0, "maximum": MAX_SIDE}
#: Keys of a face and of its box.
_FACE, _BOX = {"box", "eyes", "angle", "score"}, ("left", "top", "width", "height")


class FaceDetection:
    """See `provider_image.service.Service`."""

    name = "face_detection"
    title = "Face detection"
    help = "Finds the faces in an image, and their eyes. It does not say whose they are."
    inputs: Mapping[str, Input] = {"image": IMAGE_INPUT}
    params: tuple[Param, ...] = (
        Param(
            name="min_score",
            kind="number",
            default=0.0,
            minimum=0,
            maximum=1,
            help="Leaves out faces with a lower score. A score orders the faces of one model; it is no probability.",
            is_read_time=True,
        ),
        Param(
            name="max_faces",
            kind="whole",
            default=MAX_FACES,
            minimum=1,
            maximum=MAX_FACES,
            help="Most faces to return, those with the highest scores.",
            is_read_time=True,
        ),
    )
    outputs: Mapping[str, OutputFile] = {}
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["width", "height", "faces"],
        "properties": {
            **{
                name: {"type": "integer", "minimum": 1, "maximum": MAX_SIDE, "description": "pixels of the image"}
                for name in ("width", "height")
            },
            "faces": {
                "type": "array",
                "maxItems": MAX_FACES,
                "description": "highest score first; all coordinates are pixels of the image as it is shown, upright",
                "items": {
                    "type": "object",
                    "required": ["box", "eyes", "angle", "score"],
                    "properties": {
                        "box": {
                            "type": "object",
                            "required": list(_BOX),
                            "properties": dict.fromkeys(_BOX, _COORDINATE),
                        },
                        "eyes": {
                            "type": "array",
                            "maxItems": 2,
                            "description": "the eye on the left of an upright face first; fewer if not both were found",
                            "items": {
                                "type": "object",
                                "required": ["x", "y"],
                                "properties": {"x": _COORDINATE, "y": _COORDINATE},
                            },
                        },
                        "angle": {
                            "type": "number",
                            "minimum": -180,
                            "maximum": 180,
                            "description": "degrees by which the line through the eyes is turned clockwise; 0 if it is "
                            "not known",
                        },
                        "score": {"type": "number", "minimum": 0, "maximum": 1},
                    },
                },
            },
        },
    }
    example: Mapping[str, Any] = {
        "width": 512,
        "height": 512,
        "faces": (
            {
                "box": {"left": 170.5, "top": 68.5, "width": 109.0, "height": 109.0},
                "eyes": ({"x": 205.0, "y": 110.5}, {"x": 245.0, "y": 108.0}),
                "angle": -3.6,
                "score": 0.94,
            },
        ),
    }

    def load(self, artefact: Artefact, device: Device) -> Net:
        """Load the detector."""
        from provider_image.faces.detectors import load_detector

        return load_detector(artefact, device)

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> FittedImage:
        """Decode the image to the detector's size."""
        from provider_image.faces.detectors import decode_for_detector

        return decode_for_detector(artefact, inputs["image"])

    def run(self, net: Net, items: Sequence[FittedImage], params: Sequence[Mapping[str, Any]]) -> list[Output]:
        """Find the faces in decoded images."""
        from provider_image.faces.rows import to_json

        found = zip(items, net.infer([item.pixels for item in items]), strict=True)
        return [
            Output(data=to_json(faces, (item.pixels.shape[1], item.pixels.shape[0]), item.width, item.height))
            for item, faces in found
        ]

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check that there are faces within the image, highest score first. :raises MalformedResults:"""
        data = output.data
        if not isinstance(data, dict) or data.keys() != {"width", "height", "faces"}:
            raise MalformedResults("The output of a face detection must be width, height and faces.")
        if not all(type(data[side]) is int and 1 <= data[side] <= MAX_SIDE for side in ("width", "height")):
            raise MalformedResults("Width and height must be whole numbers of pixels.")
        if not isinstance(data["faces"], list) or len(data["faces"]) > MAX_FACES:
            raise MalformedResults(f"There must be a list of at most {MAX_FACES} faces.")
        for face in data["faces"]:
            _check_face(face, data["width"], data["height"])
        if any(one["score"] < other["score"] for one, other in itertools.pairwise(data["faces"])):
            raise MalformedResults("The faces must be in the order of their scores.")

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Compare faces in their order: edges as a share of the box, eyes likewise, and scores; 1 for another face."""
        one, other = expected.data["faces"], output.data["faces"]
        if len(one) != len(other):
            return Difference(largest=1.0, is_same_order=False)
        gaps = [_difference(*pair) for pair in zip(one, other, strict=True)]
        return Difference(largest=max(gaps, default=0.0), is_same_order=True)

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return the faces that the parameters do not leave out."""
        lowest, number = float(params.get("min_score", 0.0)), int(params.get("max_faces", MAX_FACES))
        return {**output, "faces": [face for face in output["faces"] if face["score"] >= lowest][:number]}


def _check_face(face: Any, width: int, height: int) -> None:
    """Check a face that a provider sent. :raises MalformedResults:"""
    if not isinstance(face, dict) or face.keys() != _FACE or not isinstance(face["box"], dict):
        raise MalformedResults("A face must have box, eyes, angle and score.")
    box = face["box"]
    if box.keys() != set(_BOX) or not isinstance(face["eyes"], list) or len(face["eyes"]) > 2:
        raise MalformedResults("A box must have left, top, width and height, and a face at most two eyes.")
    if not all(isinstance(eye, dict) and eye.keys() == {"x", "y"} for eye in face["eyes"]):
        raise MalformedResults("An eye must have x and y.")
    limits = [(box["left"], 0, width), (box["top"], 0, height), (face["angle"], -180, 180), (face["score"], 0, 1)]
    limits += [pair for eye in face["eyes"] for pair in ((eye["x"], 0, width), (eye["y"], 0, height))]
    for value, lowest, highest in limits:
        _check_number(value, lowest, highest)
    _check_number(box["width"], 0, width - box["left"] + _ROUNDING)
    _check_number(box["height"], 0, height - box["top"] + _ROUNDING)


def _check_number(value: Any, lowest: float, highest: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest:  # also refuses nan
        raise MalformedResults(f"A number of a face must be from {lowest:g} to {highest:g}.")


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return how far two faces are apart: lengths as a share of the box."""
    if len(one["eyes"]) != len(other["eyes"]):
        return 1.0
    scale = max(1.0, one["box"]["width"], one["box"]["height"])
    gaps = [abs(one["box"][name] - other["box"][name]) for name in _BOX]
    gaps += [math.dist((a["x"], a["y"]), (b["x"], b["y"])) for a, b in zip(one["eyes"], other["eyes"], strict=True)]
    # Coordinates are rounded, so equal ones may differ by one step.
    largest = max(0.0, max(gaps) - _ROUNDING) / scale
    return float(max(largest, abs(one["score"] - other["score"])))
