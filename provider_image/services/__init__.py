"""The registry of services."""

from __future__ import annotations

import functools
import importlib
from typing import cast

from provider_image.errors import MalformedChunk
from provider_image.service import Service

#: name -> "module:Class"; the class takes no arguments.
REGISTRY = {
    "classification": "provider_image.services.classification:Classification",
}


@functools.cache
def load_service(name: str) -> Service:
    """Return the service of this name, the same object at every call. :raises MalformedChunk: there is none."""
    if name not in REGISTRY:
        raise MalformedChunk(f"There is no service {name[:64]!r}. There are: {', '.join(sorted(REGISTRY))}.")
    module, _, attribute = REGISTRY[name].partition(":")
    return cast(Service, getattr(importlib.import_module(module), attribute)())
