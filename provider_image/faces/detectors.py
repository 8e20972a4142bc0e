"""Detectors: nets that find faces, either OpenCV's cascades or a graph with a head that `heads.py` reads.

Used by the service `face_detection`. A graph takes images of one size, the artefact's `tile`; the artefact itself has
no size, so that it gets images as they were sent, and boxes are in their pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from provider_image.errors import BrokenArtefact, InferenceFailed
from provider_image.faces.heads import HEADS, read_head
from provider_image.images.decoding import FittedImage, decode_fitted

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Arrays, Device, Net
    from provider_image.models.artefact import Artefact

    Array = np.ndarray[Any, Any]

#: For the cascades: the longest side in pixels, and that to which small images are enlarged, because the cascade sees
#: no face of less than 20 pixels.
CASCADE_SIDE, CASCADE_MIN_SIDE = 800, 240


def decode_for_detector(artefact: Artefact, data: bytes) -> FittedImage:
    """Decode an image to the size in which a detector searches it. :raises BadInput: as `decode_fitted`."""
    if artefact.net_size == (0, 0):
        return decode_fitted(data, CASCADE_SIDE, CASCADE_SIDE, enlarged_to=CASCADE_MIN_SIDE)
    height, width = artefact.net_size
    return decode_fitted(data, width, height)


def load_detector(artefact: Artefact, device: Device) -> Net:
    """Load a detector: `infer` takes decoded images, and returns faces as in `rows.py`.

    :raises BrokenArtefact, ConfigError: as `backends.load_net`.
    """
    from provider_image.backends import load_net

    if (artefact.net_size == (0, 0)) != (artefact.backend == "opencv"):
        raise BrokenArtefact(f"The model {artefact.name} is no detector: it lacks the size of what it takes.")
    net = load_net(artefact, device)
    return net if artefact.backend == "opencv" else GraphDetector(net)


class GraphDetector:
    """A graph with the head of a detector. See `provider_image.backends.Net`."""

    def __init__(self, net: Net) -> None:
        self.artefact = net.artefact
        self.batch_items = net.batch_items
        self._net = net

    def infer(self, batch: Arrays) -> list[Array]:
        """Find the faces in images.

        :param batch: uint8, shape (height, width, 3) of each, at most the detector's size.
        :return: for each image faces in its pixels, shape (n, rows.COLUMNS).
        :raises InferenceFailed: an image is too large, the graph fails or does not return what a head does.
        """
        kinds = {columns: kind for kind, columns in HEADS.items()}
        found = []
        for output in self._net.infer([self._pad(image) for image in batch]):
            if output.ndim != 2 or output.shape[1] not in kinds:
                raise InferenceFailed(f"The model {self.artefact.name} did not return the rows of a detector.")
            found.append(read_head(kinds[output.shape[1]], output, *self.artefact.net_size))
        return found

    def _pad(self, image: Array) -> Array:
        """Put an image into the upper left corner of a black one."""
        import numpy as np

        height, width = self.artefact.net_size
        if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] > height or image.shape[1] > width:
            raise InferenceFailed(
                f"The model {self.artefact.name} takes images of up to {width} x {height} pixels, not {image.shape}."
            )
        padded = np.zeros((height, width, 3), np.uint8)
        padded[: image.shape[0], : image.shape[1]] = image
        return padded
