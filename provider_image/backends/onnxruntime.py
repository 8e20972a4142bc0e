"""The ONNX Runtime backend: the only module that imports onnxruntime and runs ONNX files.

Loaded by name through `provider_image.backends`, and used by the compiler. It is for models with an operator that
OpenVINO does not have, or that OpenVINO computes otherwise. An artefact has the graph with its weights in `model.onnx`.
Weaknesses: CPU only, f32 only, one item per inference, one input and one output per graph; it needs a package that is
not installed by default.
"""

from __future__ import annotations

import importlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends import check_input
from provider_image.errors import BrokenArtefact, ConfigError, InferenceFailed
from provider_image.precision import PRECISIONS

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Arrays, Device
    from provider_image.models.artefact import Artefact

#: The only file of an artefact.
GRAPH_FILE = "model.onnx"
#: Precisions in which it computes. `auto` leaves the choice to it.
_PRECISIONS = ("f32", "auto")
#: Only errors are written to standard error.
_LOG_ERRORS = 3


def import_onnxruntime() -> Any:
    """Import onnxruntime without its telemetry, which sends usage data. :raises ImportError: it is not installed."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read once, when the library is loaded
    onnxruntime = importlib.import_module("onnxruntime")
    onnxruntime.disable_telemetry_events()  # in case that another package loaded it before
    return onnxruntime


class OnnxruntimeNet:
    """See `provider_image.backends.Net`: a session. `infer` waits while all threads of the device run it.

    An item is run alone, on the core of the thread that calls.
    """

    batch_items = 1

    def __init__(self, artefact: Artefact, session: Any, threads: int) -> None:
        self.artefact = artefact
        self._session = session
        self._input = session.get_inputs()[0].name
        self._free = threading.Semaphore(threads)

    def infer(self, batch: Arrays) -> list[np.ndarray[Any, Any]]:
        """Run the graph on each item. :raises InferenceFailed: an item does not fit the graph, or the runtime fails."""
        with self._free:
            try:
                return [self._session.run(None, {self._input: item[None]})[0][0] for item in batch]
            except Exception as error:  # its errors have no base in common
                raise InferenceFailed(f"The model {self.artefact.name} failed on this item: {error}") from error


def load_net(artefact: Artefact, device: Device) -> OnnxruntimeNet:
    """Check and load an artefact's graph.

    :raises BrokenArtefact: its files have changed, it cannot be loaded, or onnxruntime is not installed.
    :raises ConfigError: the device is not the CPU, or it does not compute in this precision.
    """
    from provider_image.models.artefact import check_files

    if device.name != "cpu":
        raise ConfigError(f"The backend onnxruntime runs on the device cpu only, not on {device.name!r}.")
    if device.precision not in PRECISIONS:
        raise ConfigError(f"There is no precision {device.precision!r}. There are: {', '.join(PRECISIONS)}.")
    if device.precision not in _PRECISIONS:
        raise ConfigError(
            f"The model {artefact.name} runs on onnxruntime, which does not compute in {device.precision}. Set "
            f"MLG_PRECISION to {' or '.join(_PRECISIONS)}."
        )
    if GRAPH_FILE not in artefact.files:
        raise BrokenArtefact(f"The model {artefact.name} has no {GRAPH_FILE}. Install it again.")
    check_files(artefact)
    try:
        session = open_session(artefact.folder / GRAPH_FILE)
        inputs = session.get_inputs()
        shape = list(inputs[0].shape) if len(inputs) == 1 else [each.name for each in inputs]
    except ImportError as error:
        raise BrokenArtefact(
            f"The model {artefact.name} runs on onnxruntime, which cannot be imported here ({error}). Install it: "
            'pip install "mlg[onnx]", in a source checkout: scripts/setup onnx; a provider needs an image that was '
            f"built with this model: mlg image build {artefact.name}"
        ) from error
    except Exception as error:  # its errors have no base in common
        raise BrokenArtefact(
            f"onnxruntime cannot load the model {artefact.name}: {error}. "
            f"Delete {artefact.folder} and install it again."
        ) from error
    check_input(artefact, shape)
    return OnnxruntimeNet(artefact, session, device.threads)


def open_session(model: Path | bytes) -> Any:
    """Load an ONNX file or its content as an InferenceSession on the CPU, with one core for each run.

    Runs may overlap: each takes the thread that calls. What cannot be loaded raises errors without a base in common.

    :raises ImportError: onnxruntime is not installed.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_ERRORS
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
