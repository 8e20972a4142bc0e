"""Makes a model's demand: a container image or a runtime, and the memory and storage that it needs.

Called by `executor.py` when the first chunk of a model is queued, and by `check.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from batcher.errors import GolemUnavailable
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.yapapi_adapter import OWNER, explain, import_yapapi
from batcher.image_build.lock import ImageAddress, PublishedImage, lock_file, read_lock
from provider_image.errors import ModelError, NotInstalled
from provider_image.models.artefact import Artefact, find_artefact

_GIB = 1024**3
#: What the system and the libraries of the container image need, in GiB of memory and of storage.
_BASE_MEMORY, _BASE_STORAGE = 0.5, 2.0
#: A loaded model needs this many times the size of its file: weights, compiled graph and activations.
_MEMORY_FACTOR = 3.0
#: Assumed size of a model that is not installed here.
_UNKNOWN_BYTES = 64 * 1024 * 1024
#: Time for the server of the image to say that it has it.
_IMAGE_SECONDS = 20.0
#: Golem's runtime for images exists for no other.
_ARCHITECTURE = "x86_64"


def choose_image(model: str, models: Path, settings: GolemSettings) -> ImageAddress | PublishedImage | None:
    """Return the image that providers run for a model; None if there is none and they need a built-in runtime.

    :param models: the home's folder of artefacts.
    :raises GolemUnavailable: the published image holds another build of the model than is installed here, or there is
        neither an image nor a runtime.
    :raises ContainerImageError: the lock file cannot be read.
    """
    if settings.image is not None:
        return settings.image
    published = read_lock(lock_file(models)).get(model)
    if published is None and settings.runtime is None:
        raise GolemUnavailable(
            f"No image with {model} is published, so providers cannot run it. Run: mlg image build {model}, then "
            f"mlg image push {model}. Or set MLG_GOLEM_IMAGE=HASH@URL to an image that holds it."
        )
    artefact = _find_installed(models, model)
    if published is not None and artefact is not None and artefact.digest != published.digest:
        raise GolemUnavailable(
            f"The published image of {model} holds another build of it (digest {published.digest[:12]}) than the one "
            f"installed here ({artefact.digest[:12]}), so its results would be rejected. Run: mlg image push {model}"
        )
    return published


async def make_payload(model: str, owner: str, models: Path, settings: GolemSettings) -> Any:
    """Make a model's demand: an image, or a runtime of providers with built-in models.

    :param owner: identifies the demand as ours, see `recovery.py`.
    :param models: the home's folder of artefacts.
    :raises GolemUnavailable: the server of the image does not respond; also as `choose_image`.
    :raises ContainerImageError: the lock file cannot be read.
    """
    image = await asyncio.to_thread(choose_image, model, models, settings)
    artefact = _find_installed(models, model)
    size = (_UNKNOWN_BYTES if artefact is None else artefact.size_bytes) / _GIB
    memory, storage = round(_BASE_MEMORY + _MEMORY_FACTOR * size, 2), round(_BASE_STORAGE + 2 * size, 2)
    import_yapapi()
    from yapapi.payload import Payload, vm

    package: Payload | None = None
    try:
        if image is not None:
            async with asyncio.timeout(_IMAGE_SECONDS):
                package = await vm.repo(
                    image_hash=image.hash,
                    image_url=image.url if isinstance(image, ImageAddress) else None,
                    image_use_https=True,
                    repository_url=settings.registry.rstrip("/"),
                    min_mem_gib=memory,
                    min_storage_gib=storage,
                    min_cpu_threads=1,
                )
    except Exception as error:
        where, remedy = f"The image registry {settings.registry} does not return the address", "MLG_GOLEM_REGISTRY"
        if isinstance(image, ImageAddress):
            where, remedy = f"{image.url} does not return the file", "MLG_GOLEM_IMAGE"
        raise GolemUnavailable(f"{where} of the image of {model}: {explain(error)}. Check {remedy}.") from error

    class ModelPayload(Payload):  # type: ignore[misc, unused-ignore]
        async def decorate_demand(self, demand: Any) -> None:
            if package is not None:
                await package.decorate_demand(demand)
                demand.ensure(f"(golem.inf.cpu.architecture={_ARCHITECTURE})")
            else:
                demand.ensure(
                    f"(&(golem.runtime.name={settings.runtime})(golem.inf.mem.gib>={memory:g})"
                    f"(golem.inf.storage.gib>={storage:g})(golem.inf.cpu.threads>=1))"
                )
            demand.add_properties({OWNER: owner, "golem.srv.app.mlg.model": model})

    return ModelPayload()


def _find_installed(models: Path, model: str) -> Artefact | None:
    with contextlib.suppress(NotInstalled, ModelError):
        return find_artefact(models, model)
    return None
