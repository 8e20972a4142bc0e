"""The OpenCV backend: methods without weights, or with OpenCV's own files, and the only module that imports cv2.

Loaded by name through `provider_image.backends`; other modules that compute with OpenCV call `import_opencv`. An
artefact has `method.json`, an object with the name of a method of METHODS and its options, and the files that the
method reads. There is no code in these files. Weaknesses: CPU only; all methods compute as they are written, whatever
the precision.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import queue
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from provider_image.errors import DAMAGED_FILE_ERRORS, BrokenArtefact, ConfigError, InferenceFailed
from provider_image.models.artefact import Artefact, check_files
from provider_image.precision import PRECISIONS

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Arrays, Device

    Array = np.ndarray[Any, Any]

#: The file of every artefact.
METHOD_FILE = "method.json"
#: name -> "module:factory", see `MethodFactory`.
METHODS = {
    "cascades": "provider_image.faces.cascades:make_method",
    "copy": "provider_image.backends.opencv:make_copy",
    "face_quality": "provider_image.faces.quality:make_method",
    "denoise": "provider_image.images.denoising:make_method",
    "quality": "provider_image.images.quality:make_method",
}
_MAX_JSON_BYTES = 65_536
#: The variable from which OpenBLAS reads its number of threads when it is loaded.
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"


class Method(Protocol):
    """A method that is ready to run. Need not be thread-safe: each thread has one of its own."""

    def __call__(self, pixels: Array) -> Array:
        """Compute the model's output for an image, uint8 RGB (height, width, 3), which it must not change."""


#: Makes a method of an artefact and of the options in its `method.json`. What it raises of DAMAGED_FILE_ERRORS means
#: that the artefact cannot be used.
MethodFactory = Callable[[Artefact, Mapping[str, Any]], Method]


@functools.cache
def import_opencv() -> Any:
    """Import cv2, set to one thread for each call, and to code that gives the same results on every processor.

    :raises ImportError: it is not installed.
    """
    # Its BLAS, which is not used here, would start a thread for each core and take memory for each.
    before = os.environ.get(_BLAS_THREADS)
    os.environ[_BLAS_THREADS] = "1"
    try:
        cv2 = importlib.import_module("cv2")
    finally:
        del os.environ[_BLAS_THREADS]
        if before is not None:
            os.environ[_BLAS_THREADS] = before
    cv2.setNumThreads(1)
    cv2.ipp.setUseIPP(False)
    return cv2


class OpencvNet:
    """See `provider_image.backends.Net`: a method for each thread of the device. An item is computed alone."""

    batch_items = 1

    def __init__(self, artefact: Artefact, methods: list[Method]) -> None:
        self.artefact = artefact
        self._methods: queue.SimpleQueue[Method] = queue.SimpleQueue()
        for method in methods:
            self._methods.put(method)

    def infer(self, batch: Arrays) -> list[Array]:
        """Compute each item. :raises InferenceFailed: an item is no image of 8-bit RGB, or OpenCV fails."""
        import numpy as np

        for item in batch:
            if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or not item.size:
                raise InferenceFailed(
                    f"The input does not fit the model {self.artefact.name}: it is no image of 8-bit RGB."
                )
        method = self._methods.get()
        try:
            return [method(item) for item in batch]
        except (import_opencv().error, ValueError) as error:
            raise InferenceFailed(f"The model {self.artefact.name} failed on this item: {error}") from error
        finally:
            self._methods.put(method)


def load_net(artefact: Artefact, device: Device) -> OpencvNet:
    """Check an artefact's files and make its method.

    :raises BrokenArtefact: a file has changed or cannot be used, there is no such method, or OpenCV is not installed.
    :raises ConfigError: the device is not the CPU, or there is no such precision.
    """
    if device.name != "cpu":
        raise ConfigError(f"The backend opencv runs on the device cpu only, not on {device.name!r}.")
    if device.precision not in PRECISIONS:
        raise ConfigError(f"There is no precision {device.precision!r}. There are: {', '.join(PRECISIONS)}.")
    check_files(artefact)
    try:
        import_opencv()
    except ImportError as error:
        raise BrokenArtefact(
            f"The model {artefact.name} runs on OpenCV, which cannot be imported here ({error}). Install it: "
            "pip install opencv-python-headless; a provider needs an image that was built with this model: "
            f"mlg image build {artefact.name}"
        ) from error
    try:
        with (artefact.folder / METHOD_FILE).open("rb") as file:
            facts = json.loads(file.read(_MAX_JSON_BYTES))
        module, _, attribute = METHODS[facts["method"]].partition(":")
        factory = cast(MethodFactory, getattr(importlib.import_module(module), attribute))
        methods = [factory(artefact, facts["options"]) for _ in range(device.threads)]
    except (*DAMAGED_FILE_ERRORS, import_opencv().error) as error:
        raise BrokenArtefact(
            f"The model {artefact.name} cannot be loaded ({type(error).__name__}: {error}). "
            f"Delete {artefact.folder}, then: {artefact.install_command}"
        ) from error
    return OpencvNet(artefact, methods)


def make_copy(artefact: Artefact, options: Mapping[str, Any]) -> Method:
    """Make the method of services that have done their work when an image is decoded. See `MethodFactory`."""
    if options:
        raise ValueError("the method copy has no options")
    return lambda pixels: pixels.copy()


def write_method(folder: Path, method: str, options: Mapping[str, Any]) -> bytes:
    """Write `method.json` into the folder of an artefact that is being built. :return: its content."""
    content = (json.dumps({"method": method, "options": options}, indent=1, sort_keys=True) + "\n").encode()
    (folder / METHOD_FILE).write_bytes(content)
    return content
