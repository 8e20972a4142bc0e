"""How well a face can be seen: size, sharpness, light and symmetry. The method `face_quality`.

Run by the backend `opencv` for the service of the same name, on an image that shows one face, upright, as the service
`crop` cuts it out. All but the size is measured on a copy of FACE_SIDE pixels, so that faces of different sizes can be
compared. Weaknesses: nothing here knows what a face is; noise looks like sharpness, and the symmetry of faces that look
into the camera varies so much that it names no problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from provider_image.backends.opencv import import_opencv

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends.opencv import Method
    from provider_image.models.artefact import Artefact

    Array = np.ndarray[Any, Any]

#: Side in pixels of what is measured.
FACE_SIDE = 112
#: What is measured, in the order of `measure_face`: name -> (lowest, highest, what it is).
MEASURES: Mapping[str, tuple[float, float, str]] = {
    "sharpness": (0, 1e6, f"variance of the Laplacian of the grey values at {FACE_SIDE} x {FACE_SIDE} pixels"),
    "brightness": (0, 1, "mean of the grey values; 0 is black, 1 is white"),
    "contrast": (0, 1, "standard deviation of the grey values; 1 is half black, half white"),
    "evenness": (0, 1, "how equally bright both halves are; 1 is equal, 0 if one is black"),
    "symmetry": (
        -1,
        1,
        "correlation of the face with its mirror image: less for a turned head, and for light from one side",
    ),
}
#: Problem -> (measure, limit): there is one below the limit.
TOO_LOW = {
    "blurred": ("sharpness", 60.0),
    "dark": ("brightness", 0.2),
    "flat": ("contrast", 0.15),
    "uneven light": ("evenness", 0.6),
}
#: A brighter face is too bright, and one with a shorter side in pixels too small.
MAX_BRIGHTNESS, MIN_SIDE = 0.85, 48
#: Names of all problems, in the order in which they are listed.
PROBLEMS = ("small", *TOO_LOW, "bright")
#: Decimals of the measures.
_DECIMALS = 4


def find_problems(measures: Mapping[str, float], width: int, height: int) -> list[str]:
    """Name what is wrong with a face, by its measures and its size in pixels."""
    found = {name for name, (measure, limit) in TOO_LOW.items() if measures[measure] < limit}
    if min(width, height) < MIN_SIDE:
        found.add("small")
    if measures["brightness"] > MAX_BRIGHTNESS:
        found.add("bright")
    return [name for name in PROBLEMS if name in found]


def describe(values: Array, width: int, height: int) -> dict[str, Any]:
    """Name what `measure_face` returned, with the face's size in pixels of the image that was sent."""
    measures = {name: round(value, _DECIMALS) for name, value in zip(MEASURES, values.tolist(), strict=True)}
    return {"width": width, "height": height, **measures, "problems": find_problems(measures, width, height)}


def measure_face(pixels: Array) -> Array:
    """Measure an image of one face, uint8 RGB (height, width, 3).

    :return: a number for each of MEASURES, f64.
    """
    import numpy as np

    cv2 = import_opencv()
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, (FACE_SIDE, FACE_SIDE), interpolation=cv2.INTER_AREA)
    values = grey.astype(np.float64)
    halves = values[:, : FACE_SIDE // 2].mean(), values[:, FACE_SIDE // 2 :].mean()
    blurred = cv2.blur(grey, (5, 5), borderType=cv2.BORDER_REFLECT_101).astype(np.float64)
    blurred -= blurred.mean()
    power = (blurred**2).sum()
    return np.array(
        [
            cv2.Laplacian(grey, cv2.CV_16S, borderType=cv2.BORDER_REFLECT_101).var(dtype=np.float64),
            values.mean() / 255,
            values.std() / 127.5,
            min(halves) / max(1.0, *halves),
            (blurred * blurred[:, ::-1]).sum() / power if power > 0 else 1.0,
        ],
        np.float64,
    ).clip([low for low, _, _ in MEASURES.values()], [high for _, high, _ in MEASURES.values()])


def make_method(artefact: Artefact, options: Mapping[str, Any]) -> Method:
    """Make the method of the backend `opencv`. See `provider_image.backends.opencv.MethodFactory`."""
    if options:
        raise ValueError("the method face_quality has no options")
    return measure_face
