"""The errors of the batcher, its executors, and the build of the provider's image.

A class's docstring is its default message and tells the cure.
"""

from __future__ import annotations

from provider_image.errors import ChunkError, MlgError


class ExecutorUnavailable(MlgError):
    """Nobody can work on this now. It is tried again by itself."""

    code = "executor_unavailable"


class NoProvider(ExecutorUnavailable):
    """No provider takes the work. See: mlg providers list"""

    code = "no_provider"


class BudgetReached(ExecutorUnavailable):
    """The budget is used up. Raise MLG_BUDGET_DAY, or wait for tomorrow."""

    code = "budget_reached"


class GolemUnavailable(ExecutorUnavailable):
    """The Golem daemon cannot be used. Is it running, and is YAGNA_APPKEY set?"""

    code = "golem_unavailable"


class ContainerImageError(MlgError):
    """The image could not be built or published."""

    code = "image_error"


class ResizingUnavailable(ChunkError):
    """No process that shrinks pictures can be started, so nothing is sent. See the batcher's log."""

    code = "shrinking_unavailable"
