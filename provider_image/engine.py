"""OpenVINO: the one place that imports it, compiles a graph and runs it.

Used by services (to load nets) and by the builders (to write graphs). Models made elsewhere are not trusted to be
sound: every failure to load one is a BrokenArtefact.
"""

from __future__ import annotations

import importlib
import queue
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.errors import BrokenArtefact, ConfigError, InferenceFailed

if TYPE_CHECKING:
    import numpy as np

    from provider_image.models.artefact import Artefact

#: What a precision means to OpenVINO. auto leaves the choice to it: on a CPU with AVX512_BF16 or AMX it then computes
#: in bf16, twice as fast, and two honest machines differ by up to 0.26 in a logit.
PRECISIONS = {"f32": "f32", "bf16": "bf16", "auto": None}


def import_openvino() -> Any:
    """Import openvino without its conversion tools, which this program does not use.

    They would take 0.15 of 0.25 seconds and bring openvino_telemetry, which sends usage data home. openvino's
    `__init__` passes over them when they are missing, so they are hidden while it is imported.
    """
    name = "openvino.tools"
    if "openvino" in sys.modules or name in sys.modules:
        return importlib.import_module("openvino")
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[name]


class Net:
    """A compiled graph that several threads may run at once."""

    def __init__(self, artefact: Artefact, compiled: Any, threads: int) -> None:
        self.artefact = artefact
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(threads):
            self._requests.put(compiled.create_infer_request())

    def infer(self, picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Run the graph on one picture, waiting while as many threads run as it was loaded for.

        :param picture: uint8, shape (height, width, 3).
        :return: the graph's first output without its batch axis; a copy.
        :raises InferenceFailed: the graph does not take this picture, or OpenVINO fails.
        """
        request = self._requests.get()
        try:
            outputs = request.infer({0: picture[None]}, share_inputs=True, share_outputs=True)
            result: np.ndarray[Any, Any] = outputs[0][0].copy()
        except RuntimeError as error:
            raise InferenceFailed(f"The model {self.artefact.name} failed on this item: {error}") from error
        finally:
            self._requests.put(request)
        return result


def load_net(artefact: Artefact, threads: int, precision: str) -> Net:
    """Check and compile an artefact's graph for that many pictures side by side, each on one core.

    :raises BrokenArtefact: its files have changed, or OpenVINO cannot compile them.
    """
    from provider_image.models.artefact import check_files

    check_files(artefact)
    import numpy as np

    try:
        compiled = compile_graph(artefact.folder / "model.xml", threads, precision)
        expected = [1, artefact.height, artefact.width, 3]
        if list(compiled.input(0).shape) != expected:
            raise BrokenArtefact(f"The graph of {artefact.name} takes {compiled.input(0).shape}, not {expected}.")
        net = Net(artefact, compiled, threads)
        # One inference while there is only this thread. OpenVINO's binding sets up its numpy side on first use, in a
        # way that deadlocks for ever when two threads come first at the same time (seen in one of five cold runs).
        net.infer(np.zeros(expected[1:], np.uint8))
        return net
    except RuntimeError as error:
        raise BrokenArtefact(
            f"OpenVINO cannot load the model {artefact.name}: {error}. Delete {artefact.folder} and install it again."
        ) from error


def compile_graph(graph: Path, threads: int, precision: str) -> Any:
    """Compile a graph file for the processor, with one stream for each thread.

    :return: OpenVINO's CompiledModel.
    :raises RuntimeError: OpenVINO cannot read or compile it.
    """
    core = import_openvino().Core()
    options = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": str(threads),
        "INFERENCE_NUM_THREADS": str(threads),
        # Pinned, the single threads of several processes would all sit on the first core and leave the others idle.
        "ENABLE_CPU_PINNING": "NO",
        **hints(precision),
    }
    return core.compile_model(core.read_model(str(graph)), "CPU", options)


def run_graph(graph: Path, pictures: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Run pictures through a graph file in f32, one after another; for builders, which have no artefact yet.

    :param pictures: uint8, shape (height, width, 3) as the graph takes them.
    :return: the first output for each, without its batch axis.
    :raises RuntimeError: OpenVINO cannot read, compile or run it.
    """
    request = compile_graph(graph, 1, "f32").create_infer_request()
    return [request.infer({0: picture[None]})[0][0].copy() for picture in pictures]


def hints(precision: str) -> dict[str, str]:
    """Return OpenVINO's setting for a precision. :raises ConfigError: there is no such precision."""
    if precision not in PRECISIONS:
        raise ConfigError(f"There is no precision {precision!r}. There are: {', '.join(PRECISIONS)}.")
    wanted = PRECISIONS[precision]
    return {} if wanted is None else {"INFERENCE_PRECISION_HINT": wanted}
