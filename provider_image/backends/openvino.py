"""The OpenVINO backend: the only module that imports it, compiles graphs and runs them.

Loaded by name through `provider_image.backends`, and used by the compiler. An artefact has the graph in `model.xml` and
its weights in `model.bin`. Weaknesses: CPU only, one item per inference, one input and one output per graph.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import queue
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.backends import check_input
from provider_image.errors import BrokenArtefact, ConfigError, InferenceFailed
from provider_image.precision import PRECISIONS

if TYPE_CHECKING:
    import numpy as np

    from provider_image.backends import Arrays, Device
    from provider_image.models.artefact import Artefact

#: The files of an artefact: the graph and its weights.
GRAPH_FILES = ("model.xml", "model.bin")
#: Interval at which the memory of weights that were read is released while a graph is compiled.
_RELEASE_INTERVAL_SECONDS = 0.01

_prepared_lock = threading.Lock()
_is_prepared = False


@contextlib.contextmanager
def hidden_module(name: str) -> Iterator[None]:
    """Let imports of a module fail while the block runs."""
    hidden = {each: sys.modules.pop(each) for each in list(sys.modules) if f"{each}.".startswith(f"{name}.")}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(hidden)


def import_openvino() -> Any:
    """Import openvino without its conversion tools, which are not needed.

    They would take 0.15 of 0.25 seconds and import openvino_telemetry, which sends usage data. openvino's `__init__`
    ignores it when they are missing, so they are hidden during the import.
    """
    if "openvino" in sys.modules or "openvino.tools" in sys.modules:
        return importlib.import_module("openvino")
    with hidden_module("openvino.tools"):
        return importlib.import_module("openvino")


class OpenvinoNet:
    """See `provider_image.backends.Net`: a compiled graph. `infer` waits while all threads of the device run it.

    An item is run alone, on one core: on CPUs that is faster than a batch on all of them.
    """

    batch_items = 1

    def __init__(self, artefact: Artefact, compiled: CompiledGraph, threads: int) -> None:
        self.artefact = artefact
        self._compiled = compiled
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(threads):
            self._requests.put(compiled.graph.create_infer_request())

    def infer(self, batch: Arrays) -> list[np.ndarray[Any, Any]]:
        """Run the graph on each item. :raises InferenceFailed: an item does not fit the graph, or OpenVINO fails."""
        request = self._requests.get()
        try:
            return [
                request.infer({0: item[None]}, share_inputs=True, share_outputs=True)[0][0].copy() for item in batch
            ]
        except RuntimeError as error:
            raise InferenceFailed(f"The model {self.artefact.name} failed on this item: {error}") from error
        finally:
            self._requests.put(request)


class CompiledGraph:
    """A graph that OpenVINO has compiled, and its weights, which it may read as long as it is used."""

    def __init__(self, graph: Any, weights: MappedWeights) -> None:
        #: OpenVINO's CompiledModel.
        self.graph = graph
        self._weights = weights


class MappedWeights:
    """A memory-mapped weights file: only the parts that are being read take memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # OpenVINO requires writable memory. It does not write, and copy-on-write would not change the file.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self) -> Any:
        """Return an OpenVINO tensor of the weights; this object must be kept as long as the tensor is used."""
        import numpy as np

        return import_openvino().Tensor(np.frombuffer(self._map, np.uint8), shared_memory=True)

    @contextlib.contextmanager
    def releasing(self) -> Iterator[None]:
        """Release the memory of weights that were read, repeatedly while the block runs.

        OpenVINO reads the weights once and stores a copy in the processor's preferred layout. Otherwise both would be
        in memory at that time: VGG16 took 1,270 MB instead of 720. What is read again comes from the file.
        """
        is_finished = threading.Event()

        def work() -> None:
            while not is_finished.wait(_RELEASE_INTERVAL_SECONDS):
                self._map.madvise(mmap.MADV_DONTNEED)

        thread = threading.Thread(target=work, name="weights", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_finished.set()
            thread.join()
            self._map.madvise(mmap.MADV_DONTNEED)


def load_net(artefact: Artefact, device: Device) -> OpenvinoNet:
    """Check and compile an artefact's graph.

    :raises BrokenArtefact: its files have changed, or OpenVINO cannot compile them.
    :raises ConfigError: the device is not the CPU, or there is no such precision.
    """
    from provider_image.models.artefact import check_files

    if device.name != "cpu":
        raise ConfigError(f"The backend openvino runs on the device cpu only, not on {device.name!r}.")
    if not artefact.files.keys() >= set(GRAPH_FILES):
        raise BrokenArtefact(f"The model {artefact.name} has no {' and '.join(GRAPH_FILES)}. Install it again.")
    with ThreadPoolExecutor(1, thread_name_prefix="check") as pool:
        # In parallel to compiling, which mostly uses one core: saves a third of the time to load VGG16.
        checked = pool.submit(check_files, artefact)
        try:
            initialise_binding()
            compiled = compile_graph(artefact.folder / "model.xml", device.threads, _precision(artefact, device))
        except (RuntimeError, ValueError, OSError) as error:
            checked.result()  # changed files are the better explanation
            raise BrokenArtefact(
                f"OpenVINO cannot load the model {artefact.name}: {error}. "
                f"Delete {artefact.folder} and install it again."
            ) from error
        checked.result()
    check_input(artefact, list(compiled.graph.input(0).shape))
    return OpenvinoNet(artefact, compiled, device.threads)


def _precision(artefact: Artefact, device: Device) -> str:
    """Return the precision in which an artefact is computed. A copy is computed as it was judged.

    What int8 is not for, such as a softmax, is f32 then.
    """
    if artefact.reduced is None:
        return device.precision
    return "bf16" if artefact.reduced.precision == "bf16" else "f32"


def initialise_binding() -> None:
    """Run one inference of a trivial graph in this thread, once per process.

    OpenVINO's binding initialises its numpy part on first use, and deadlocks if two threads do so at the same time
    (seen in one of five cold runs). With the graph of a large model this would take 0.4 seconds.
    """
    global _is_prepared
    with _prepared_lock:
        if _is_prepared:
            return
        import numpy as np

        openvino = import_openvino()
        number = openvino.opset8.parameter([1], np.uint8)
        graph = openvino.Model([openvino.opset8.convert(number, "f32")], [number])
        request = openvino.Core().compile_model(graph, "CPU", _options(1, "f32")).create_infer_request()
        request.infer({0: np.zeros(1, np.uint8)}, share_inputs=True, share_outputs=True)[0].copy()
        _is_prepared = True


def compile_graph(graph: Path, threads: int, precision: str) -> CompiledGraph:
    """Compile a graph file for the processor, with one stream per thread.

    :raises RuntimeError: OpenVINO cannot read or compile it.
    :raises OSError: a file cannot be read.
    :raises ValueError: the weights file is empty.
    """
    core = import_openvino().Core()
    weights = MappedWeights(graph.with_suffix(".bin"))
    model = core.read_model(graph.read_bytes(), weights.tensor())
    with weights.releasing():
        return CompiledGraph(core.compile_model(model, "CPU", _options(threads, precision)), weights)


def compile_part(
    graph: Path, shapes: Mapping[str, Sequence[int]], outputs: Sequence[str], threads: int, precision: str
) -> CompiledGraph:
    """Compile what some outputs of a graph file need, for inputs of these shapes; all threads work on one item.

    :param shapes: name of each input that is needed -> its shape.
    :param outputs: the names of the outputs, which are those of tensors.
    :raises: as `compile_graph`; ValueError also if there is no such output.
    """
    openvino = import_openvino()
    core, weights = openvino.Core(), MappedWeights(graph.with_suffix(".bin"))
    whole = core.read_model(graph.read_bytes(), weights.tensor())
    found = {name: port for port in whole.outputs for name in port.get_names()}
    missing = [name for name in outputs if name not in found]
    if missing:
        raise ValueError(f"{graph} has no output {missing[0]}")
    results = [found[name].get_node() for name in outputs]
    part = openvino.Model(results, [each.get_node() for each in whole.inputs if each.get_any_name() in shapes])
    part.reshape({name: list(shape) for name, shape in shapes.items()})
    options = {**_options(1, precision), "INFERENCE_NUM_THREADS": str(threads)}
    with weights.releasing():
        return CompiledGraph(core.compile_model(part, "CPU", options), weights)


def _options(threads: int, precision: str) -> dict[str, str]:
    """Return OpenVINO's settings. :raises ConfigError: there is no such precision."""
    if precision not in PRECISIONS:
        raise ConfigError(f"There is no precision {precision!r}. There are: {', '.join(PRECISIONS)}.")
    hint = PRECISIONS[precision]
    return {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": str(threads),
        "INFERENCE_NUM_THREADS": str(threads),
        # With pinning, single-threaded processes would all run on the first core and leave the others idle.
        "ENABLE_CPU_PINNING": "NO",
        **({} if hint is None else {"INFERENCE_PRECISION_HINT": hint}),
    }
