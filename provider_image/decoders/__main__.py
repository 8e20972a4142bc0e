"""The main program of a process that decodes images: `python -m provider_image.decoders`.

Started by `provider_image.decoders.Decoder`; the package's docstring describes the protocol. It must not open the store
or know of requests: a malicious image may take control of it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

from provider_image.chunk import open_chunk
from provider_image.cores import MAX_JOB_BYTES, allocated_bytes, limit_resource
from provider_image.decoders import FILES, KILL_MARGIN_SECONDS, MAX_FILES, MAX_JSON_BYTES, READY
from provider_image.errors import ImageTooLarge, InferenceFailed, MlgError
from provider_image.images.quality import encode_measures
from provider_image.images.resizing import resize
from provider_image.images.thumbnails import draw_sheet, thumbnail
from provider_image.models.artefact import find_artefact
from provider_image.runtime import prepare_item
from provider_image.schemas import MAX_REASON
from provider_image.services import load_service
from provider_image.system_calls import refuse_sockets, restrict_files

log = logging.getLogger(__name__)


def main() -> int:
    """Run jobs until the owner's end of the socket closes."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    # Pillow warns of odd metadata in images, which cannot be fixed here.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # Before there are other threads. Where it is not possible, there remain the limits.
    refuse_sockets()
    restrict_files(map(Path, sys.argv[1:]))
    threading.Thread(target=_exit_with_owner, daemon=True).start()
    _limit_memory()
    with Connection(sys.stdin.fileno()) as owner, contextlib.suppress(EOFError):
        owner.send_bytes(READY)
        while True:
            job = json.loads(owner.recv_bytes(MAX_JSON_BYTES))
            files = _receive_files(job["inputs"])
            signal.setitimer(signal.ITIMER_REAL, job["limit_seconds"] + KILL_MARGIN_SECONDS)
            _limit_processor_time(job["limit_seconds"])
            reply, data = _run_job(job, files)
            owner.send_bytes(json.dumps({**reply, "inputs": list(data)}).encode())
            for each in data.values():
                owner.send_bytes(each)
            signal.setitimer(signal.ITIMER_REAL, 0)
            del data
    return 0


def _limit_memory() -> None:
    """Limit what this process may allocate from now on. What every image needs is loaded first."""
    importlib.import_module("numpy")
    importlib.import_module("PIL.Image")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_resource(resource.RLIMIT_DATA, allocated_bytes() + MAX_JOB_BYTES)


def _limit_processor_time(seconds: float) -> None:
    """Have the kernel end this process when it has used that much more processor time."""
    limit_resource(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))


def _exit_with_owner() -> None:
    hang_up = select.poll()
    hang_up.register(0, 0)  # a hang-up is reported without being requested
    hang_up.poll()
    os._exit(0)  # from a thread, during an image whose result is not needed


def _receive_files(names: Sequence[str]) -> dict[str, BinaryIO]:
    if not names:
        return {}
    with socket.fromfd(sys.stdin.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as owner:
        _, opened, _, _ = socket.recv_fds(owner, len(FILES), MAX_FILES)
    return {name: os.fdopen(number, "rb") for name, number in zip(names, opened, strict=True)}


def _resize(inputs: Mapping[str, bytes], **options: Any) -> dict[str, bytes]:
    return {name: resize(each, **options) for name, each in inputs.items()}


def _thumbnail(inputs: Mapping[str, bytes], side: int) -> dict[str, bytes]:
    return {name: thumbnail(each, side) for name, each in inputs.items()}


def _measure(inputs: Mapping[str, bytes], with_tilt: bool) -> dict[str, bytes]:
    return {name: encode_measures(each, with_tilt=with_tilt) for name, each in inputs.items()}


def _sheet(inputs: Mapping[str, bytes], cells: list[tuple[str | None, list[str]]]) -> dict[str, bytes]:
    return {"sheet": draw_sheet([(None if name is None else inputs[name], lines) for name, lines in cells])}


def _try_item(chunk: BinaryIO, path: str, models: str, number: int) -> dict[str, bytes]:
    """Prepare an item of a chunk file as a worker does."""
    with open_chunk(Path(path), chunk) as reader:
        artefact = find_artefact(Path(models), reader.model)
        prepare_item(load_service(reader.service), artefact, reader, reader.items[number])
    return {}


#: The works by their names; `try` takes a chunk, of which it reads one item.
_WORKS: Mapping[str, Callable[..., dict[str, bytes]]] = {
    "resize": _resize,
    "thumbnail": _thumbnail,
    "sheet": _sheet,
    "measure": _measure,
}


def _run_job(job: dict[str, Any], files: Mapping[str, BinaryIO]) -> tuple[dict[str, Any], dict[str, bytes]]:
    with contextlib.ExitStack() as opened:
        for file in files.values():
            opened.enter_context(file)
        if job["do"] == "try":
            return _reply(lambda: _try_item(files["chunk"], **job["options"]))
        try:
            inputs = {name: file.read() for name, file in files.items()}
        except OSError as error:
            return {"errno": error.errno, "text": error.strerror}, {}
        return _reply(lambda: _WORKS[job["do"]](inputs, **job["options"]))


def _reply(work: Callable[[], dict[str, bytes]]) -> tuple[dict[str, Any], dict[str, bytes]]:
    try:
        return {}, work()
    except MemoryError:
        failed: MlgError = ImageTooLarge("Decoding the image takes too much memory. Scale it down and send it again.")
    except Exception as error:
        if not isinstance(error, MlgError):
            log.exception("job failed")
        failed = InferenceFailed.from_exception(error)
    reply = failed.to_reply()
    # Truncated like a reason in a results file, so that clients see the same text.
    return {**reply, "reason": reply["reason"][:MAX_REASON]}, {}


if __name__ == "__main__":
    sys.exit(main())
