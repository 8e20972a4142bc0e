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
from batcher.executors.golem.yapapi_adapter import Requirements, builtin_payload, explain, image_payload
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


def requirements_for(size_bytes: int) -> Requirements:
    """Return what a model with an artefact of this size needs."""
    size = size_bytes / _GIB
    return Requirements(
        memory_gib=round(_BASE_MEMORY + _MEMORY_FACTOR * size, 2), storage_gib=round(_BASE_STORAGE + 2 * size, 2)
    )


async def make_payload(model: str, owner: str, models: Path, settings: GolemSettings) -> Any:
    """Make a model's demand: its published container image if there is one, else a runtime with built-in models.

    :param owner: identifies the demand as ours, see `recovery.py`.
    :param models: the folder of artefacts.
    :raises GolemUnavailable: the image registry does not respond, or the published image holds another build of the
        model than is installed here.
    :raises ContainerImageError: the lock file cannot be read.
    """
    artefact: Artefact | None = None
    with contextlib.suppress(NotInstalled, ModelError):
        artefact = find_artefact(models, model)
    requirements = requirements_for(_UNKNOWN_BYTES if artefact is None else artefact.size_bytes)
    published = (await asyncio.to_thread(read_lock)).get(model)
    if published is None:
        return builtin_payload(settings.runtime, requirements, owner, model)
    if artefact is not None and artefact.digest != published.digest:
        raise GolemUnavailable(
            f"The published image of {model} holds another build of it (digest {published.digest[:12]}) than the one "
            f"installed here ({artefact.digest[:12]}), so its results would be rejected. Run: mlg image push {model}"
        )
    try:
        return await image_payload(published.hash, settings.registry, requirements, owner, model)
    except Exception as error:
        raise GolemUnavailable(
            f"The image registry {settings.registry} does not return the address of the image of {model}: "
            f"{explain(error)}. Check MLG_GOLEM_REGISTRY."
        ) from error
