"""What both methods of style transfer share: how they are asked, when they stop, and Adam.

Adam is Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015. Numpy is imported on first use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: How fast the averages of the gradient and of its square follow it, and what is added to the divisor.
_BETAS, _EPSILON = (0.9, 0.99), 1e-8
#: The length of the last step of a run as a share of that of its first.
_LAST_STEP = 0.2


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """How an image gets the style of another."""

    #: 0 keeps the image, 1 forgets it.
    strength: float
    #: False takes the colours of the style.
    keeps_colours: bool
    #: Steps of the optimisation.
    iterations: int
    #: Seconds after which it stops with what it has.
    seconds: float
    #: Called after each step with the part that is done, and what returns the image so far, uint8 RGB.
    on_step: Callable[[float, Callable[[], Array]], None] = lambda fraction, image: None


@dataclass(kw_only=True)
class Budget:
    """The steps and the time of a run."""

    options: TransferOptions
    #: Steps that were made.
    done: int = 0
    started_at: float = field(default_factory=time.monotonic)

    @property
    def is_left(self) -> bool:
        """Tell whether there may be another step; there is always one."""
        is_late = time.monotonic() - self.started_at >= self.options.seconds
        return self.done < self.options.iterations and not (is_late and self.done)

    def count(self, image: Callable[[], Array]) -> None:
        """Count a step, and report it."""
        self.done += 1
        self.options.on_step(self.done / self.options.iterations, image)


class Adam:
    """The state of an optimisation of `steps` steps.

    :param rate: length of a step at the start; it falls evenly to a fifth of that.
    """

    def __init__(self, rate: float, steps: int) -> None:
        self._rate, self._steps, self._done = rate, steps, 0
        self._mean: Any = 0.0
        self._square: Any = 0.0

    def step(self, gradient: Array) -> Array:
        """Return what to add to the values, of the shape and the type of the gradient.

        The scale of gradients does not matter, however small they are.
        """
        import numpy as np

        self._done += 1
        first, second = _BETAS
        self._mean = first * self._mean + (1 - first) * gradient
        self._square = second * self._square + (1 - second) * np.square(gradient)
        rate = self._rate * (1 - (1 - _LAST_STEP) * (self._done - 1) / max(1, self._steps - 1))
        deviation = np.sqrt(self._square / (1 - second**self._done))
        deviation += _EPSILON * float(deviation.max()) + np.finfo(deviation.dtype).tiny
        return np.asarray((-rate / (1 - first**self._done)) * self._mean / deviation, gradient.dtype)
