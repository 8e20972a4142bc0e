"""The backend `style`: gives an image the style of another, by one of two methods (`provider_image/style/`).

Loaded by name through `provider_image.backends`. An artefact has its settings in `style.json`, and for the method
`gradient` a graph in `model.xml` and its weights in `model.bin`. Weaknesses: CPU only, one image at a time, which all
threads of the device share.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.errors import BrokenArtefact, ConfigError, InferenceFailed
from provider_image.models.artefact import Artefact, check_files
from provider_image.precision import PRECISIONS
from provider_image.style.optimising import TransferOptions
from provider_image.style.pixels import MIN_SIDE

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Arrays, Device
    from provider_image.style.gradient import GradientGraph

    Array = np.ndarray[Any, Any]

SETTINGS_FILE = "style.json"
#: The methods: patches need no network, the gradient is that of a graph.
TEXTURE, GRADIENT = "texture", "gradient"
#: Most iterations and pixels that an artefact may ask for.
MAX_ITERATIONS, MAX_PIXELS = 500, 1024 * 1024
_MAX_SETTINGS_BYTES = 4096
#: How `infer` transfers, which has no parameters.
_STRENGTH = 0.5
_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class StyleSettings:
    """The settings of an artefact."""

    #: texture or gradient.
    method: str
    #: Iterations, unless a request asks for another number.
    iterations: int
    #: Most pixels of an image; larger ones are reduced.
    max_pixels: int

    def write(self, folder: Path) -> None:
        """Write them into the folder of an artefact that is being built."""
        (folder / SETTINGS_FILE).write_text(json.dumps(asdict(self)) + "\n")


def read_settings(artefact: Artefact) -> StyleSettings:
    """Read the settings of an artefact. :raises BrokenArtefact: they cannot be read."""
    path = artefact.folder / SETTINGS_FILE
    try:
        with path.open("rb") as file:
            raw = json.loads(file.read(_MAX_SETTINGS_BYTES))
        settings = StyleSettings(**raw)
        if settings.method not in (TEXTURE, GRADIENT):
            raise ValueError(f"there is no method {settings.method!r:.64}")
        limits = ((settings.iterations, 1, MAX_ITERATIONS), (settings.max_pixels, MIN_SIDE**2, MAX_PIXELS))
        if not all(type(value) is int and low <= value <= high for value, low, high in limits):
            raise ValueError("a number is out of range")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BrokenArtefact(
            f"{path} cannot be read: {error}. Delete {artefact.folder}, then: {artefact.install_command}"
        ) from error
    return settings


class StyleNet:
    """See `provider_image.backends.Net`: takes pairs of images, uint8 of shape (2, height, width, 3), and returns RGB.

    `infer` gives the first image the style of the second as it is done by default; services call `transfer`.
    """

    batch_items = 1

    def __init__(self, artefact: Artefact, settings: StyleSettings, graph: GradientGraph | None) -> None:
        self.artefact = artefact
        self.settings = settings
        self._graph = graph
        # Two images at a time would take twice the memory, and be no faster.
        self._lock = threading.Lock()

    def transfer(self, content: Array, style: Array, options: TransferOptions) -> tuple[Array, int]:
        """Give an image the style of another.

        :param content, style: uint8 RGB, shape (height, width, 3), each side at least MIN_SIDE.
        :return: uint8 RGB of the size of the content, and how many iterations were made.
        :raises InferenceFailed: OpenVINO fails, or there is not enough memory.
        """
        with self._lock:
            if self._graph is None:
                from provider_image.style import texture

                return texture.transfer(content, style, options)
            from provider_image.style import gradient

            try:
                return gradient.transfer(self._graph, content, style, options)
            except RuntimeError as error:
                raise InferenceFailed(f"The model {self.artefact.name} failed on this item: {error}") from error

    def infer(self, batch: Arrays) -> list[Array]:
        """Transfer the style in each pair. :raises InferenceFailed: an array is no pair of images."""
        import numpy as np

        options = TransferOptions(
            strength=_STRENGTH, keeps_colours=True, iterations=self.settings.iterations, seconds=_SECONDS
        )
        found = []
        for pair in batch:
            is_pair = pair.ndim == 4 and (len(pair), pair.shape[3]) == (2, 3) and min(pair.shape[1:3]) >= MIN_SIDE
            if not is_pair or pair.dtype != np.uint8:
                raise InferenceFailed(
                    f"The input does not fit the model {self.artefact.name}: it is no pair of images."
                )
            found.append(self.transfer(pair[0], pair[1], options)[0])
        return found


def load_net(artefact: Artefact, device: Device) -> StyleNet:
    """Check and read an artefact's files.

    :raises BrokenArtefact: a file has changed or cannot be read, or OpenVINO cannot read the graph.
    :raises ConfigError: the device is not the CPU, or there is no such precision.
    """
    if device.name != "cpu":
        raise ConfigError(f"The backend style runs on the device cpu only, not on {device.name!r}.")
    if device.precision not in PRECISIONS:
        raise ConfigError(f"There is no precision {device.precision!r}. There are: {', '.join(PRECISIONS)}.")
    check_files(artefact)
    settings = read_settings(artefact)
    if settings.method == TEXTURE:
        return StyleNet(artefact, settings, None)
    from provider_image.backends.openvino import GRAPH_FILES, initialise_binding
    from provider_image.style.gradient import GradientGraph

    if not artefact.files.keys() >= set(GRAPH_FILES):
        raise BrokenArtefact(f"The model {artefact.name} has no {' and '.join(GRAPH_FILES)}. Install it again.")
    try:
        initialise_binding()
        graph = GradientGraph(artefact.folder / GRAPH_FILES[0], device.threads, device.precision)
        graph.check()
    except (RuntimeError, ValueError, OSError) as error:
        raise BrokenArtefact(
            f"OpenVINO cannot load the model {artefact.name}: {error}. Delete {artefact.folder} and install it again."
        ) from error
    return StyleNet(artefact, settings, graph)
