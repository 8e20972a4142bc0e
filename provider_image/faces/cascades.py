"""Faces found by the cascades that come with OpenCV: the method of the model `face_detector`.

Run by the backend `opencv`. Viola and Jones (2001), with the cascades `haarcascade_frontalface_alt2` for faces and
`haarcascade_eye` for eyes, copied into the artefact when it is built. Weaknesses: it finds faces that look into the
camera and are nearly upright; turned, covered and small ones are often missed, and a pattern that looks like a face is
sometimes taken for one. docs/faces.md has the figures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends.opencv import import_opencv
from provider_image.faces.rows import COLUMNS, keep_best

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends.opencv import Method
    from provider_image.models.artefact import Artefact

    Array = np.ndarray[Any, Any]

#: The files of an artefact, and the names that OpenCV's package has for them.
FACES_FILE, EYES_FILE = "faces.xml", "eyes.xml"
SOURCES = {FACES_FILE: "haarcascade_frontalface_alt2.xml", EYES_FILE: "haarcascade_eye.xml"}
#: Each step of the search enlarges the window by this factor.
_STEP = 1.1
#: Pixels that are added on each side, as its edge is: a face that fills the image is found only with some of them.
_BORDER = 32
#: Hits of neighbouring windows that make a face, and an eye.
_FACE_NEIGHBOURS, _EYE_NEIGHBOURS = 3, 3
#: Smallest face in pixels of the scaled image.
_MIN_FACE = 24
#: A face is scaled to this many pixels before its eyes are searched, in the upper part with this share of its height.
_FACE_SIDE, _EYES_SHARE = 120, 0.6
#: Eyes are at least and at most this share of the face's width apart, and their line is turned by at most so much.
_EYE_DISTANCE, _MAX_TILT = (0.25, 0.65), 30.0
#: The weight of the last stage at which a score is a half, and by which it changes.
_HALF_WEIGHT, _WEIGHT_SCALE = 55.5, 0.5


def make_files() -> dict[str, bytes]:
    """Return the files of an artefact beside its `method.json`, by name. Needs OpenCV."""
    folder = Path(import_opencv().data.haarcascades)
    return {name: (folder / source).read_bytes() for name, source in SOURCES.items()}


class Cascades:
    """Both cascades. See `provider_image.backends.opencv.Method`."""

    def __init__(self, faces: str, eyes: str) -> None:
        cv2 = import_opencv()
        self._faces, self._eyes = cv2.CascadeClassifier(faces), cv2.CascadeClassifier(eyes)
        if self._faces.empty() or self._eyes.empty():
            raise ValueError("a file is no cascade")

    def __call__(self, pixels: Array) -> Array:
        """Find the faces of an image. :return: shape (n, rows.COLUMNS)."""
        import numpy as np

        cv2 = import_opencv()
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        grey = cv2.copyMakeBorder(grey, *[_BORDER] * 4, cv2.BORDER_REPLICATE)
        boxes, _, weights = self._faces.detectMultiScale3(
            grey,
            scaleFactor=_STEP,
            minNeighbors=_FACE_NEIGHBOURS,
            minSize=(_MIN_FACE, _MIN_FACE),
            outputRejectLevels=True,
        )
        found = np.full((len(boxes), COLUMNS), np.nan)
        for row, box, weight in zip(found, boxes, np.ravel(weights), strict=True):
            row[0:4] = box
            row[4:8] = self._find_eyes(cv2, grey, *map(int, box))
            row[8] = 1 / (1 + math.exp(min(50.0, (_HALF_WEIGHT - weight) / _WEIGHT_SCALE)))
        found[:, [0, 1, 4, 5, 6, 7]] -= _BORDER
        return keep_best(found)

    def _find_eyes(self, cv2: Any, grey: Array, left: int, top: int, width: int, height: int) -> tuple[float, ...]:
        """Find the eyes in the upper part of a face. :return: x and y of both; nan if there is no pair."""
        upper = grey[top : top + max(1, int(height * _EYES_SHARE)), left : left + width]
        scale = _FACE_SIDE / width
        upper = cv2.resize(upper, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        eyes = self._eyes.detectMultiScale(upper, scaleFactor=_STEP, minNeighbors=_EYE_NEIGHBOURS)
        centres = [(x + across / 2, y + down / 2, across * down) for x, y, across, down in eyes]
        pairs = []
        for one, other in itertools.combinations(sorted(centres), 2):
            distance = (other[0] - one[0]) / _FACE_SIDE
            tilt = math.degrees(math.atan2(other[1] - one[1], max(1e-9, other[0] - one[0])))
            if _EYE_DISTANCE[0] <= distance <= _EYE_DISTANCE[1] and abs(tilt) <= _MAX_TILT:
                # The pair whose middle is nearest to that of the face.
                pairs.append((abs((one[0] + other[0]) / 2 - _FACE_SIDE / 2), one, other))
        if not pairs:
            return (math.nan,) * 4
        _, one, other = min(pairs)
        return left + one[0] / scale, top + one[1] / scale, left + other[0] / scale, top + other[1] / scale


def make_method(artefact: Artefact, options: Mapping[str, Any]) -> Method:
    """Make the method of the backend `opencv`. See `provider_image.backends.opencv.MethodFactory`."""
    if options:
        raise ValueError("the method cascades has no options")
    return Cascades(*(str(artefact.folder / file) for file in (FACES_FILE, EYES_FILE)))
