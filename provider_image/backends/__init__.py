"""Backends: each loads the artefacts that name it on a device, and runs batches.

A service calls `load_net`, and knows from it nothing but the net. What fails while loading is a BrokenArtefact: models
from elsewhere are not trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from provider_image.cores import available_cores
from provider_image.errors import BrokenArtefact
from provider_image.extensions import BACKENDS, Extensions

if TYPE_CHECKING:
    import numpy as np

    from provider_image.models.artefact import Artefact

#: The model's input, or its output, for each item of a batch.
Arrays = Sequence["np.ndarray[Any, Any]"]
#: name -> "module:loader", see `Loader`. Other packages add to it by entry points of this group.
REGISTRY = Extensions(
    BACKENDS,
    {
        "openvino": "provider_image.backends.openvino:load_net",
        "onnxruntime": "provider_image.backends.onnxruntime:load_net",
        "linear": "provider_image.backends.linear:load_net",
        "opencv": "provider_image.backends.opencv:load_net",
        "style": "provider_image.backends.style:load_net",
    },
)


#: This project's backends that compute on the processor only.
_ON_CPU = frozenset({"openvino", "linear", "opencv", "style"})
#: How the names of GPUs begin; a number follows.
GPU = "cuda:"


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a net runs on."""

    #: Its name, cpu or for example cuda:0; a backend refuses those that it does not know.
    name: str = "cpu"
    #: Items that are processed at the same time, each on one core.
    threads: int = field(default_factory=available_cores)
    #: Precision of the inference: f32, bf16 or auto.
    precision: str = "f32"
    #: Most items that a net gets at once, if it can take several; the runtime then fills batches from all chunks.
    batch_items: int = 1


class Net(Protocol):
    """A loaded model. Thread-safe."""

    #: The artefact that it was loaded from.
    artefact: Artefact
    #: Most items of one call of `Service.run`, and so of `infer`.
    batch_items: int

    def infer(self, batch: Arrays) -> Arrays:
        """Run the model on a batch.

        :param batch: the model's input for each item, without a batch axis.
        :return: a copy of the model's output for each item, likewise.
        :raises InferenceFailed: an array does not fit the model, or the backend fails.
        """


#: Loads an artefact. :raises BrokenArtefact: :raises ConfigError: there is no such device or precision.
Loader = Callable[["Artefact", Device], Net]


def load_net(artefact: Artefact, device: Device) -> Net:
    """Load an artefact with its backend; one that computes on the processor only does so beside any GPU.

    :raises: as a `Loader`, also if the backend is not installed.
    """
    if artefact.backend not in REGISTRY:
        raise BrokenArtefact(
            f"The model {artefact.name} needs the backend {artefact.backend[:64]!r}, which is not installed. "
            f"There are: {', '.join(sorted(REGISTRY))}."
        )
    if artefact.backend in _ON_CPU and device.name.startswith(GPU):
        device = replace(device, name="cpu")
    return cast(Loader, REGISTRY.load(artefact.backend))(artefact, device)


def check_input(artefact: Artefact, shape: list[Any], *, may_be_open: bool = False) -> None:
    """Compare the shape of a graph's input with the artefact. :raises BrokenArtefact: it is another.

    :param may_be_open: whether the axis of the batch may have a name in place of the number 1.
    """
    expected = [1, *artefact.net_size, 3] if any(artefact.net_size) else [1, len(artefact.columns)]
    is_open = may_be_open and bool(shape) and isinstance(shape[0], str)
    if ([1, *shape[1:]] if is_open else shape) != expected:
        raise BrokenArtefact(f"The graph of {artefact.name} takes {shape}, not {expected}.")
