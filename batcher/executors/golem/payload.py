"""Makes a model's demand: a container image or a runtime, and the memory and storage that it needs.

Called by `executor.py` when the first chunk of a model is queued.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from batcher.errors import GolemUnavailable
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.yapapi_adapter import OWNER, explain
from batcher.image_build.lock import read_lock
from provider_image.errors import ModelError, NotInstalled
from provider_image.models.artefact import Artefact, find_artefact

_GIB = 1024**3
#: What the system and the libraries of the container image need, in GiB of memory and of storage.
_BASE_MEMORY, _BASE_STORAGE = 0.5, 2.0
#: A loaded model needs this many times the size of its file: weights, compiled graph and activations.
_MEMORY_FACTOR = 3.0
#: Assumed size of a model that is not installed here.
_UNKNOWN_BYTES = 64 * 1024 * 1024


async def make_payload(model: str, owner: str, models: Path, settings: GolemSettings) -> Any:
    """Make a model's demand: its published container image if there is one, else a runtime with built-in models.

    :param owner: identifies the demand as ours, see `recovery.py`.
    :raises GolemUnavailable: the image registry does not respond, or the published image holds another build of the
        model than is installed here.
    :raises ContainerImageError: the lock file cannot be read.
    """
    artefact: Artefact | None = None
    with contextlib.suppress(NotInstalled, ModelError):
        artefact = find_artefact(models, model)
    size = (_UNKNOWN_BYTES if artefact is None else artefact.size_bytes) / _GIB
    memory, storage = round(_BASE_MEMORY + _MEMORY_FACTOR * size, 2), round(_BASE_STORAGE + 2 * size, 2)
    published = (await asyncio.to_thread(read_lock)).get(model)
    if published is not None and artefact is not None and artefact.digest != published.digest:
        raise GolemUnavailable(
            f"The published image of {model} holds another build of it (digest {published.digest[:12]}) than the one "
            f"installed here ({artefact.digest[:12]}), so its results would be rejected. Run: mlg image push {model}"
        )
    from yapapi.payload import Payload, vm

    package: Payload | None = None
    try:
        if published is not None:
            package = await vm.repo(
                image_hash=published.hash,
                image_use_https=True,
                repository_url=settings.registry.rstrip("/"),
                min_mem_gib=memory,
                min_storage_gib=storage,
                min_cpu_threads=1,
            )
    except Exception as error:
        raise GolemUnavailable(
            f"The image registry {settings.registry} does not return the address of the image of {model}: "
            f"{explain(error)}. Check MLG_GOLEM_REGISTRY."
        ) from error

    class ModelPayload(Payload):  # type: ignore[misc, unused-ignore]
        async def decorate_demand(self, demand: Any) -> None:
            if package is not None:
                await package.decorate_demand(demand)
            else:
                demand.ensure(
                    f"(&(golem.runtime.name={settings.runtime})(golem.inf.mem.gib>={memory:g})"
                    f"(golem.inf.storage.gib>={storage:g})(golem.inf.cpu.threads>=1))"
                )
            demand.add_properties({OWNER: owner, "golem.srv.app.mlg.model": model})

    return ModelPayload()
