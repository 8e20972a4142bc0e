"""The main program of a process that resizes items: `python -m batcher.resizing`.

Started by `batcher.resizing.Decoder`; the package's docstring describes the protocol. It must not open the store or
know of requests: a malicious image may take control of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from batcher.resizing import KILL_MARGIN_SECONDS, MAX_JSON_BYTES, READY
from provider_image.chunk import open_chunk
from provider_image.errors import InferenceFailed, MlgError
from provider_image.images.resizing import resize
from provider_image.models.artefact import find_artefact
from provider_image.runtime import prepare_item
from provider_image.schemas import MAX_REASON
from provider_image.services import load_service

log = logging.getLogger(__name__)


def main() -> int:
    """Resize items until the batcher's end of the socket closes."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    # Pillow warns of odd metadata in images, which cannot be fixed here.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    threading.Thread(target=_exit_with_batcher, daemon=True).start()
    with Connection(sys.stdin.fileno()) as batcher, contextlib.suppress(EOFError):
        batcher.send_bytes(READY)
        while True:
            job = json.loads(batcher.recv_bytes(MAX_JSON_BYTES))
            signal.setitimer(signal.ITIMER_REAL, job["limit_seconds"] + KILL_MARGIN_SECONDS)
            reply, data = _run_job(job)
            batcher.send_bytes(json.dumps({**reply, "inputs": list(data)}).encode())
            for each in data.values():
                batcher.send_bytes(each)
            signal.setitimer(signal.ITIMER_REAL, 0)
            del data
    return 0


def _exit_with_batcher() -> None:
    hang_up = select.poll()
    hang_up.register(0, 0)  # a hang-up is reported without being requested
    hang_up.poll()
    os._exit(0)  # from a thread, during an image whose result is not needed


def _run_job(job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    if "chunk" in job:
        return _reply_of(lambda: _try_item(**job["chunk"]))
    try:
        inputs = {name: Path(path).read_bytes() for name, path in job["inputs"].items()}
    except OSError as error:
        return {"errno": error.errno, "text": error.strerror}, {}
    return _reply_of(lambda: {name: resize(each, **job["size"]) for name, each in inputs.items()})


def _try_item(path: str, models: str, number: int) -> dict[str, bytes]:
    with open_chunk(Path(path)) as reader:
        artefact = find_artefact(Path(models), reader.model)
        prepare_item(load_service(reader.service), artefact, reader, reader.items[number])
    return {}


def _reply_of(work: Callable[[], dict[str, bytes]]) -> tuple[dict[str, Any], dict[str, bytes]]:
    try:
        return {}, work()
    except Exception as error:
        if not isinstance(error, MlgError):
            log.exception("item failed")
        reply = InferenceFailed.from_exception(error).to_reply()
        # Truncated like a reason in a results file, so that clients see the same text.
        return {**reply, "reason": reply["reason"][:MAX_REASON]}, {}


if __name__ == "__main__":
    sys.exit(main())
