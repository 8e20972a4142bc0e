"""The runtime: loads a chunk's model, runs batches of items, writes the results file.

Called by the warm process and by `run --cold`. One thread per core takes as many items as the net runs at once, decodes
and runs them; chunks that are under way at the same time share the threads. Pillow and OpenVINO release the GIL, so the
decoding of one item overlaps with the inference of another. The bytes of an item are read when its turn comes and
dropped when it is decoded, so memory does not grow with the chunk. Where there is little memory for the number of
threads, an item waits until what it is estimated to take is free. While items are worked on, the kernel limits what
this process may allocate: one that makes a decoder take memory without end fails alone, and the machine goes on. There
is no limit on the time of an item: who sent the chunk limits that of the chunk, and ends the process.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from provider_image.backends import Device, Net
from provider_image.backends.batches import DeviceBatches
from provider_image.chunk import ChunkReader, ItemEntry, ItemResult, Results, open_chunk, write_results
from provider_image.cores import MAX_JOB_BYTES, AllocationLimit, MemoryBudget, available_memory_bytes
from provider_image.errors import BrokenArtefact, InferenceFailed, MalformedChunk, MlgError, NotInstalled, WorkerDied
from provider_image.images.headers import MAX_PIXELS, read_header
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.models.processor import cpu_name, proc_field
from provider_image.models.quickest import find_quickest
from provider_image.precision import FASTEST
from provider_image.progress import ProgressBoard, reporting
from provider_image.service import Output, Service, are_inputs, check_params, describe_inputs
from provider_image.services import load_service

logger = logging.getLogger(__name__)

#: A number, what the service's `prepare` returned for an item, and its parameters.
_ReadyItem = tuple[int, Any, Mapping[str, Any]]
#: What a loaded net takes beside its weights: buffers and code.
_NET_BYTES = 64 * 1024 * 1024
#: Share of the memory that loaded nets may take, of all processes together; chunks may take as much.
_NETS_SHARE = 0.5
#: What an image takes beside its pixels and its file: the buffers of resizing, and the net's input and output.
_IMAGE_BYTES = 16 * 1024 * 1024
#: Bytes of a decoded pixel: as it was stored, and as RGB.
_PIXEL_BYTES = 8
#: What a thread of the runtime takes itself, at most: its stack, and memory that it keeps for later.
_THREAD_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to run."""

    service: Service
    artefact: Artefact
    #: What the service's `load` returned.
    net: Net
    #: Runs what `prepare` returned, with the parameters, in batches that are filled from all chunks; None: each chunk
    #: runs its own.
    batches: DeviceBatches[tuple[Any, Mapping[str, Any]], Output | Exception] | None = None
    #: Seconds to load it for this call; 0 if it was loaded before.
    seconds: float
    #: Precision of the inference.
    precision: str


def default_net_bytes(processes: int = 1) -> int:
    """Return how much memory the loaded nets of each of so many processes may take."""
    return int(available_memory_bytes() * _NETS_SHARE / processes)


def net_bytes(artefact: Artefact) -> int:
    """Estimate the memory that an artefact takes when it is loaded; f16 weights become f32."""
    return artefact.size_bytes * (2 if artefact.precision == "f16" else 1) + _NET_BYTES


class NetCache:
    """The loaded nets of one process, and the threads that run items on them. Thread-safe: chunks may overlap.

    :param device: with the precision `fastest`, the copy of a model that is the quickest on this processor is taken in
        its place, if there is one.
    :param max_bytes: most memory of the nets that remain loaded, by `net_bytes`; the least recently used is dropped
        first. Those in use together take no more either, unless it is a single one. None takes half of the memory that
        there is.
    """

    def __init__(
        self,
        models: Path,
        device: Device | None = None,
        *,
        max_bytes: int | None = None,
        find_service: Callable[[str], Service] = load_service,
    ) -> None:
        self._max_bytes = default_net_bytes() if max_bytes is None else max_bytes
        device = device or Device()
        self._takes_quickest = device.precision == FASTEST
        self._broken_copies: set[str] = set()
        #: What the nets run on.
        self.device = replace(device, precision="f32") if self._takes_quickest else device
        #: Memory that the items under way may take together.
        self.budget = MemoryBudget(max(self._max_bytes, MAX_JOB_BYTES))
        #: True if there is enough for an item of the largest size in each thread.
        self.has_ample_memory = self.budget.total_bytes >= MAX_JOB_BYTES * self.device.threads
        #: What the kernel lets them allocate.
        self.limit = AllocationLimit(self.budget.total_bytes + _THREAD_BYTES * self.device.threads)
        self._models = models
        self._find_service = find_service
        self._loaded: collections.OrderedDict[tuple[Path, str], LoadedModel] = collections.OrderedDict()
        #: Held while a net is found or loaded.
        self._loading = threading.RLock()
        #: Notified when a chunk no longer uses its net.
        self._changed = threading.Condition()
        #: The artefact of each chunk under way.
        self._in_use: list[Artefact] = []
        #: Work on the items of all chunks, in the order in which these come.
        self.threads = ThreadPoolExecutor(self.device.threads, thread_name_prefix="item")

    @contextlib.contextmanager
    def use(self, service: str, model: str, digest: str | None) -> Iterator[LoadedModel]:
        """Get a model as `get` does, when there is room for it, and keep it loaded for the block."""
        with self._loading:
            with self.limit.lifted():  # it may be built
                artefact = self._quickest(self._find(service, model, digest))
            with self._changed:
                self._changed.wait_for(lambda: self._has_room(artefact))
                self._in_use.append(artefact)
            try:
                loaded = self.get(service, model, digest)
            except BaseException:
                self._release(artefact)
                raise
            with self._changed:  # meanwhile it may have been installed again, or its copy found to be damaged
                self._in_use[self._in_use.index(artefact)] = loaded.artefact
        try:
            yield loaded
        finally:
            self._release(loaded.artefact)

    def _release(self, artefact: Artefact) -> None:
        with self._changed:
            self._in_use.remove(artefact)
            self._changed.notify_all()

    def get(self, service: str, model: str, digest: str | None) -> LoadedModel:
        """Return a model that is ready to run; build and load it first if necessary.

        :param digest: digest of the required artefact; None accepts any.
        :raises NotInstalled: it is not installed and cannot be built, or another artefact of it is installed.
        :raises ModelError: it is installed but cannot be loaded.
        :raises MalformedChunk: there is no such service, or the model belongs to another.
        """
        with self._loading:
            started = time.perf_counter()
            implementation = self._find_service(service)
            artefact = self._quickest(self._find(service, model, digest))
            key = _key(artefact)
            if key in self._loaded:
                self._loaded.move_to_end(key)
                return replace(self._loaded[key], artefact=artefact, seconds=0.0)
            self._make_room(artefact)
            with self.limit.lifted():  # of items of other chunks
                net, artefact = self._load(implementation, artefact, service, model, digest)
            loaded = LoadedModel(
                service=implementation,
                artefact=artefact,
                net=net,
                seconds=time.perf_counter() - started,
                precision=self.device.precision if artefact.reduced is None else artefact.reduced.precision,
            )
            size = min(net.batch_items, self.device.batch_items)
            if size > 1:
                loaded = replace(loaded, batches=DeviceBatches(functools.partial(_run_mixed, loaded), size))
            self._loaded[_key(artefact)] = loaded
            return loaded

    def _load(
        self, implementation: Service, artefact: Artefact, service: str, model: str, digest: str | None
    ) -> tuple[Net, Artefact]:
        try:
            return implementation.load(artefact, self.device), artefact
        except BrokenArtefact as error:
            if artefact.reduced is not None and artefact.name != model:
                logger.warning("a copy is not used: %s", error, extra={"model": model})
                self._broken_copies.add(artefact.digest)
                artefact = self._quickest(self._find(service, model, digest))
                self._make_room(artefact)
                return self._load(implementation, artefact, service, model, digest)
            # Its model.json is intact, so the damage is only found now. Meanwhile it may have been installed again.
            current = self._find(service, model, digest)
            artefact = self._find(service, model, digest, error) if current is artefact else current
            return implementation.load(artefact, self.device), artefact

    def _quickest(self, artefact: Artefact) -> Artefact:
        return find_quickest(self._models, artefact, without=self._broken_copies) if self._takes_quickest else artefact

    def _find(self, service: str, model: str, digest: str | None, broken: BrokenArtefact | None = None) -> Artefact:
        artefact = _find_or_build(self._models, model, broken)
        if artefact.service != service:
            raise MalformedChunk(f"The model {model} is for {artefact.service}, not for {service[:64]}.")
        if digest is not None and digest != artefact.digest:
            raise NotInstalled(
                f"The chunk requires {model} with digest {digest[:12]}; the installed one has {artefact.digest[:12]}. "
                "Use the same version of mlg on both machines, then install the model again."
            )
        return artefact

    def _make_room(self, artefact: Artefact) -> None:
        """Drop the least recently used nets until this one fits beside the others; keep those in use."""
        left = self._max_bytes - net_bytes(artefact)
        with self._changed:
            used = {_key(each) for each in self._in_use}
        for key in [key for key in self._loaded if key not in used]:
            if sum(net_bytes(each.net.artefact) for each in self._loaded.values()) <= left:
                break
            dropped = self._loaded.pop(key)
            if dropped.batches is not None:
                dropped.batches.close()

    def _has_room(self, artefact: Artefact) -> bool:
        """Tell whether this net fits beside those in use."""
        used = {_key(each): each for each in (*self._in_use, artefact)}
        return len(used) == 1 or sum(map(net_bytes, used.values())) <= self._max_bytes


def _key(artefact: Artefact) -> tuple[Path, str]:
    return artefact.folder, artefact.digest


def _has_compiler() -> bool:
    """Tell whether this installation can compile models; the provider image ships without the compiler."""
    return importlib.util.find_spec("provider_image.compiler") is not None


def _find_or_build(models: Path, model: str, broken: BrokenArtefact | None = None) -> Artefact:
    """Return the model's artefact, building it first if that needs no download. :raises: as `find_artefact`.

    :param broken: why the installed one cannot be loaded; raised if it cannot be built again.
    """
    if _has_compiler():
        from provider_image.compiler import ensure_installed

        return ensure_installed(models, model, broken=broken)
    if broken is not None:
        raise broken
    return find_artefact(models, model)


def run_chunk(
    chunk: Path,
    results: Path,
    nets: NetCache,
    *,
    board: ProgressBoard | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Results:
    """Process a chunk file and write its results file. An item that fails does not affect the others.

    :param board: gets what the service reports of the items under way.
    :param is_wanted: asked before items are begun that do not go into a batch with those of other chunks. Once nobody
        wants the results, no others are begun.
    :raises WorkerDied: nobody wants the results.
    :raises MlgError: the chunk as a whole cannot be processed; no results file is written.
    :raises OSError: the results file cannot be written.
    """
    with open_chunk(chunk) as reader, nets.use(reader.service, reader.model, reader.digest) as loaded:
        for item in reader.items:
            if not are_inputs(loaded.service, item.sizes):
                raise MalformedChunk(
                    f"Item {item.number} must have the inputs {describe_inputs(loaded.service.inputs)}."
                )
        size = 1 if loaded.batches is not None else loaded.net.batch_items
        batches = [reader.items[start : start + size] for start in range(0, len(reader.items), size)]
        with nets.limit.applied():
            if loaded.batches is None:
                done = list(
                    nets.threads.map(
                        lambda batch: _run_in_budget(reader, loaded, batch, board, nets) if is_wanted() else [], batches
                    )
                )
            else:
                begun = list(nets.threads.map(lambda batch: _begin(reader, loaded, batch[0], nets), batches))
                done = [[each.result()] for each in begun]
        if not is_wanted():
            raise WorkerDied("Nobody waits for the chunk any more.")
        found = Results(
            chunk_id=reader.chunk_id,
            model=reader.model,
            digest=loaded.artefact.digest,
            versions=versions(),
            precision=loaded.precision,
            cpu=cpu_name(),
            load_seconds=loaded.seconds,
            peak_memory_bytes=peak_memory_bytes(),
            items=tuple(result for results_of_batch in done for result in results_of_batch),
        )
    write_results(results, found)
    return found


def _run_in_budget(
    reader: ChunkReader, loaded: LoadedModel, batch: Sequence[ItemEntry], board: ProgressBoard | None, nets: NetCache
) -> list[ItemResult]:
    """Prepare and run some items when there is memory for them."""
    with _hold(nets, loaded, reader, batch):
        return _run_batch(reader, loaded, batch, board)


def _hold(
    nets: NetCache, loaded: LoadedModel, reader: ChunkReader, batch: Sequence[ItemEntry]
) -> contextlib.AbstractContextManager[None]:
    """Return a block for which some items hold the memory that they may take."""
    if nets.has_ample_memory:
        return contextlib.nullcontext()
    return nets.budget.hold(sum(item_bytes(loaded.service, reader, item) for item in batch))


def _begin(reader: ChunkReader, loaded: LoadedModel, item: ItemEntry, nets: NetCache) -> Future[ItemResult]:
    """Prepare an item and have it run with others. Until it is done, it holds the memory that it may take."""
    assert loaded.batches is not None
    result: Future[ItemResult] = Future()
    held = contextlib.ExitStack()
    held.enter_context(_hold(nets, loaded, reader, [item]))
    ready, seconds = _prepare(reader, loaded, item)
    submitted = time.perf_counter()

    def end(outcome: Output | Exception) -> None:
        held.close()
        result.set_result(_result(reader, item.number, outcome, seconds + time.perf_counter() - submitted))

    if isinstance(ready, Exception):
        end(ready)
    else:
        _, prepared, params = ready
        loaded.batches.submit((prepared, params)).add_done_callback(lambda future: end(_outcome(future)))
    return result


def _outcome(future: Future[Output | Exception]) -> Output | Exception:
    try:
        return future.result()
    except Exception as error:  # noqa: BLE001 - as that of an item
        return error


def _run_mixed(loaded: LoadedModel, items: Sequence[tuple[Any, Mapping[str, Any]]]) -> Sequence[Output | Exception]:
    """Run items of several chunks; if several fail, each alone."""
    outcomes = _run_ready(loaded, [(number, *item) for number, item in enumerate(items)], None)
    return [outcomes[number] for number in range(len(items))]


def item_bytes(service: Service, reader: ChunkReader, item: ItemEntry) -> int:
    """Estimate the memory that an item takes: of images and rows little, of others as much as an item may."""
    kinds = {service.inputs[name].kind for name in item.sizes}
    if service.outputs or "file" in kinds:
        return MAX_JOB_BYTES
    try:
        inputs = reader.read_inputs(item)
        headers = [read_header(inputs[name], MAX_PIXELS) for name in inputs if service.inputs[name].kind == "image"]
    except Exception:  # noqa: BLE001 - it fails again when it is prepared, before it is decoded
        return _IMAGE_BYTES
    pixels = sum(header.buffer_bytes + _PIXEL_BYTES * header.width * header.height for header in headers)
    return min(MAX_JOB_BYTES, _IMAGE_BYTES + sum(item.sizes.values()) + pixels)


def _run_batch(
    reader: ChunkReader, loaded: LoadedModel, batch: Sequence[ItemEntry], board: ProgressBoard | None
) -> list[ItemResult]:
    """Prepare and run some items. One that fails does not affect the others."""
    seconds: dict[int, float] = {}
    outcomes: dict[int, Output | Exception] = {}
    ready: list[_ReadyItem] = []
    for item in batch:
        prepared, seconds[item.number] = _prepare(reader, loaded, item)
        if isinstance(prepared, Exception):
            outcomes[item.number] = prepared
        else:
            ready.append(prepared)
    started = time.perf_counter()
    outcomes |= _run_ready(loaded, ready, board) if ready else {}
    for number, _, _ in ready:
        seconds[number] += (time.perf_counter() - started) / len(ready)
    return [_result(reader, item.number, outcomes[item.number], seconds[item.number]) for item in batch]


def _prepare(reader: ChunkReader, loaded: LoadedModel, item: ItemEntry) -> tuple[_ReadyItem | Exception, float]:
    """Prepare an item. :return: with its number, or why it cannot be used; seconds that it took."""
    started = time.perf_counter()
    try:
        ready: _ReadyItem | Exception = (
            item.number,
            *prepare_item(loaded.service, loaded.artefact, reader, item),
        )
    except MemoryError as error:
        # Not kept itself: its traceback has what the item allocated.
        ready = InferenceFailed.from_exception(error)
    except Exception as error:  # noqa: BLE001 - one item must not affect the others
        ready = error
    return ready, time.perf_counter() - started


def prepare_item(
    service: Service, artefact: Artefact, reader: ChunkReader, item: ItemEntry
) -> tuple[Any, Mapping[str, Any]]:
    """Read and decode an item. :return: what the service's `prepare` returned, and the parameters.

    :raises BadInput: its inputs or parameters cannot be used.
    :raises MalformedChunk: it is damaged.
    """
    params = check_params(service.params, item.params)
    return service.prepare(artefact, reader.read_inputs(item), params, is_resized=reader.is_resized), params


def _run_ready(
    loaded: LoadedModel, ready: Sequence[_ReadyItem], board: ProgressBoard | None
) -> dict[int, Output | Exception]:
    """Run items; if several fail, each alone."""
    numbers = [number for number, _, _ in ready]
    try:
        with reporting(board, numbers):
            outputs = loaded.service.run(loaded.net, [item for _, item, _ in ready], [params for _, _, params in ready])
        return dict(zip(numbers, outputs, strict=True))
    except Exception as error:  # noqa: BLE001 - likewise
        if len(ready) == 1:
            return {numbers[0]: error}
        return {number: outcome for one in ready for number, outcome in _run_ready(loaded, [one], board).items()}


def _result(reader: ChunkReader, number: int, outcome: Output | Exception, seconds: float) -> ItemResult:
    if isinstance(outcome, Output):
        return ItemResult(number=number, output=outcome.data, files=outcome.files, seconds=seconds)
    if not isinstance(outcome, MlgError):
        # A bug in a service or a library fails only this item, and is logged.
        logger.error("item failed", exc_info=outcome, extra={"chunk": reader.chunk_id, "item": number})
    return ItemResult(number=number, error=InferenceFailed.from_exception(outcome), seconds=seconds)


def versions() -> dict[str, str]:
    """Return program -> version of Python and of those libraries that are loaded; imports nothing."""
    found = {"python": sys.version.split()[0]}
    for package, name in (
        ("openvino", "openvino"),
        ("onnxruntime", "onnxruntime"),
        ("cv2", "opencv"),
        ("numpy", "numpy"),
        ("PIL", "pillow"),
    ):
        version = getattr(sys.modules.get(package), "__version__", None)
        if version is not None:
            found[name] = str(version)[:100]
    return found


def peak_memory_bytes() -> int:
    """Return the peak memory of this process, 0 where the system does not provide it.

    Not from getrusage: on Linux that value is inherited from the parent process across exec.
    """
    return int((proc_field(Path("/proc/self/status"), "VmHWM") or "0").split()[0]) * 1024
