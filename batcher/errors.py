"""The errors of the batcher, its executors, and the build of the provider's image.

A class's docstring is its default message; it says what to do.
"""

from __future__ import annotations

from provider_image.errors import ChunkError, MalformedResults, MlgError


class ExecutorUnavailable(MlgError):
    """No worker is available now. The work is retried automatically."""


class NoProvider(ExecutorUnavailable):
    """No provider is available. See: mlg providers list"""


class BudgetReached(ExecutorUnavailable):
    """The budget is used up. Raise MLG_BUDGET_DAY, or wait until tomorrow (UTC)."""


class GolemUnavailable(ExecutorUnavailable):
    """The Golem daemon cannot be used. Check that it runs (yagna service run) and that YAGNA_APPKEY is set."""


class ContainerImageError(MlgError):
    """The container image could not be built or published."""

    code = "image_error"


class UntrueResults(MalformedResults):
    """The results are proven to be wrong, so the provider is at fault and no item."""

    code = "malformed_results"


class ModelReplaced(MlgError):
    """The model was removed or installed again while it computed, so it computes again as it is now."""


class ImageMissing(MlgError):
    """The image's file is missing from the store. Send the image again."""

    code = "picture_missing"
    permanent = True


class ResizingUnavailable(ChunkError):
    """No process that resizes images can be started, so nothing is sent. See the batcher's log."""

    code = "shrinking_unavailable"
