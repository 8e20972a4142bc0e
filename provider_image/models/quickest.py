"""The copies of a model in other precisions, and the quickest of them on this processor.

Used by the runtime where MLG_PRECISION is `fastest`, and by the batcher to know whose answers they are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from pathlib import Path

from provider_image.errors import ModelError, NotInstalled, UnknownModel
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.models.processor import processor_id
from provider_image.precision import REDUCED

logger = logging.getLogger(__name__)


def copy_name(model: str, precision: str) -> str:
    """Return the name of a model's copy in a precision."""
    return f"{model}_{precision}"


def find_copies(models: Path, artefact: Artefact) -> list[Artefact]:
    """List the installed copies of exactly this artefact. Two stats if nothing has changed.

    One of an earlier artefact of the model is none, and neither is one whose classes got other names.
    """
    found = []
    for precision in REDUCED:
        with contextlib.suppress(NotInstalled, UnknownModel, ModelError):
            copy = find_artefact(models, copy_name(artefact.name, precision))
            is_copy = copy.reduced is not None and copy.reduced.base_digest == artefact.digest
            if is_copy and copy.labels == artefact.labels:
                found.append(copy)
    return found


def find_quickest(models: Path, artefact: Artefact, *, without: Collection[str] = ()) -> Artefact:
    """Return the copy of an artefact that is the quickest on this processor, or itself.

    A copy counts only where it was judged on such a processor: another one may compute other numbers.

    :param without: digests of copies that are left out.
    """
    quickest, speedup = artefact, 1.0
    for copy in find_copies(models, artefact):
        assert copy.reduced is not None
        is_judged_here = copy.reduced.processor_id == processor_id()
        if is_judged_here and copy.digest not in without and copy.reduced.speedup > speedup:
            quickest, speedup = copy, copy.reduced.speedup
    return quickest
