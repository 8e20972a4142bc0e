"""The ONNX Runtime backend: the only module that imports onnxruntime and runs ONNX files.

Loaded by name through `provider_image.backends`, and used by the compiler. It is for models with an operator that
OpenVINO does not have, or that OpenVINO computes otherwise, and for GPUs. An artefact has the graph with its weights in
`model.onnx`. A graph whose axis of the batch is open runs as many items at once as the device says; others run one.
Weaknesses: f32 only, of GPUs only those of CUDA, one input and one output per graph; it needs a package that is not
installed by default.
"""

from __future__ import annotations

import importlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends import GPU, Device, check_input
from provider_image.errors import BrokenArtefact, ConfigError, InferenceFailed
from provider_image.precision import PRECISIONS

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Arrays
    from provider_image.models.artefact import Artefact

#: The only file of an artefact.
GRAPH_FILE = "model.onnx"
#: Precisions in which it computes. `auto` leaves the choice to it.
_PRECISIONS = ("f32", "auto")
#: Only errors are written to standard error.
_LOG_ERRORS = 3
#: Both packages have the module onnxruntime, so that one hides the other.
_HOW_TO_INSTALL = (
    'Install the one for GPUs in its place: pip uninstall onnxruntime, then pip install "mlg[gpu]". Or set '
    "MLG_DEVICE=cpu."
)
_CPU_PROVIDER, _GPU_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
#: An ONNX file whose graph returns its input, one number in f32: opset 17, one operation Identity from x to y.
_TRIVIAL_GRAPH = bytes.fromhex(
    "080812003a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a017912"
    "0a0a08080112040a02080142040a001011"
)


def import_onnxruntime() -> Any:
    """Import onnxruntime without its telemetry, which sends usage data. :raises ImportError: it is not installed."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read once, when the library is loaded
    onnxruntime = importlib.import_module("onnxruntime")
    onnxruntime.disable_telemetry_events()  # in case that another package loaded it before
    return onnxruntime


class OnnxruntimeNet:
    """See `provider_image.backends.Net`: a session. `infer` waits while all threads of the device run it.

    On the processor, a call runs on the core of the thread that calls.

    :param batch_items: most items of one run of the session.
    """

    def __init__(self, artefact: Artefact, session: Any, threads: int, batch_items: int = 1) -> None:
        self.artefact = artefact
        self.batch_items = batch_items
        self._session = session
        self._input = session.get_inputs()[0].name
        self._free = threading.Semaphore(threads)

    def infer(self, batch: Arrays) -> list[np.ndarray[Any, Any]]:
        """Run the graph. :raises InferenceFailed: an item does not fit the graph, or the runtime fails."""
        import numpy as np

        size, found = self.batch_items, []
        with self._free:
            try:
                for start in range(0, len(batch), size):
                    taken = batch[start : start + size]
                    items = np.stack(taken) if len(taken) > 1 else taken[0][None]
                    outputs = self._session.run(None, {self._input: items})[0]
                    if len(outputs) != len(items):
                        raise ValueError(f"{len(outputs)} outputs for {len(items)} items")
                    found += [output.copy() for output in outputs] if len(items) > 1 else list(outputs)
            except Exception as error:  # its errors have no base in common
                raise InferenceFailed(f"The model {self.artefact.name} failed on this item: {error}") from error
        return found


def load_net(artefact: Artefact, device: Device) -> OnnxruntimeNet:
    """Check and load an artefact's graph.

    :raises BrokenArtefact: its files have changed, it cannot be loaded, or onnxruntime is not installed.
    :raises ConfigError: there is no such device, or it does not compute in this precision.
    """
    from provider_image.models.artefact import check_files

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
        session = open_session(artefact.folder / GRAPH_FILE, device)
        inputs = session.get_inputs()
        shape = list(inputs[0].shape) if len(inputs) == 1 else [each.name for each in inputs]
    except ConfigError:
        raise
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
    check_input(artefact, shape, may_be_open=True)
    return OnnxruntimeNet(artefact, session, device.threads, device.batch_items if isinstance(shape[0], str) else 1)


def open_session(model: Path | bytes, device: Device | None = None) -> Any:
    """Load an ONNX file or its content as an InferenceSession; on the processor, with one core for each run.

    Runs may overlap: each takes the thread that calls. What cannot be loaded raises errors without a base in common.

    :raises ImportError: onnxruntime is not installed.
    :raises ConfigError: there is no such device, or it cannot be used.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_ERRORS
    source = model if isinstance(model, bytes) else str(model)
    if device is None or device.name == "cpu":
        return onnxruntime.InferenceSession(source, options, providers=[_CPU_PROVIDER])
    return _open_on_gpu(onnxruntime, source, options, device)


def check_device(device: Device) -> str:
    """Run a trivial graph on a device. :return: a sentence about it. :raises ConfigError: it cannot be used."""
    try:
        import numpy as np

        open_session(_TRIVIAL_GRAPH, device).run(None, {"x": np.zeros(1, np.float32)})
    except ImportError as error:
        raise ConfigError(
            f"The device {device.name} needs onnxruntime, which cannot be imported ({error}). {_HOW_TO_INSTALL}"
        ) from error
    except RuntimeError as error:
        raise ConfigError(f"The device {device.name} cannot be used: {error}") from error
    return f"The device {device.name} works with onnxruntime {import_onnxruntime().__version__}."


def _open_on_gpu(onnxruntime: Any, source: bytes | str, options: Any, device: Device) -> Any:
    """Load a model on a GPU, and never on the processor instead. :raises ConfigError: it cannot be used."""
    number = device.name.removeprefix(GPU)
    if not device.name.startswith(GPU) or not (number.isascii() and number.isdigit()):
        raise ConfigError(f"There is no device {device.name!r}. Set MLG_DEVICE to cpu or, for a GPU, {GPU}0.")
    if _GPU_PROVIDER not in onnxruntime.get_available_providers():
        raise ConfigError(
            f"The device {device.name} cannot be used: this onnxruntime computes on the processor only. "
            f"{_HOW_TO_INSTALL}"
        )
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA and cuDNN, where they are installed as Python packages
    # f32 on newer cards otherwise has 10 bits of precision.
    settings = {"device_id": number, "use_tf32": "0" if device.precision == "f32" else "1"}
    providers = [(_GPU_PROVIDER, settings), _CPU_PROVIDER]
    session = onnxruntime.InferenceSession(source, options, providers=providers)
    # What the card cannot compute is left to the processor, but if the card is absent, everything would be.
    if _GPU_PROVIDER not in session.get_providers():
        raise ConfigError(
            f"The device {device.name} cannot be used: there is no such card, or its driver, CUDA or cuDNN are "
            "missing. Look at nvidia-smi, or set MLG_DEVICE=cpu."
        )
    session.disable_fallback()
    return session
