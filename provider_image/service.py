"""The interface of a service: one kind of work on images, described once.

Validation, forms, the API description, help texts and the contract test are derived from it. The server uses its
parameters and views, the batcher checks outputs with it, the runtime runs it. A new service is one file in `services/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from provider_image.errors import InvalidParams

if TYPE_CHECKING:
    from provider_image.models.artefact import Artefact


@dataclass(frozen=True, kw_only=True)
class Param:
    """A parameter of a request."""

    #: Its name in query strings, forms and chunk files.
    name: str
    #: One of whole, number, choice.
    kind: str
    #: Its value if the client does not set it.
    default: Any
    #: Range of a whole or number, both ends included.
    minimum: float | None = None
    maximum: float | None = None
    #: The values of a choice.
    choices: tuple[str, ...] = ()
    #: One sentence of help.
    help: str
    #: True if it only changes how a stored output is shown; it is not sent to a provider then.
    is_read_time: bool = False

    def check(self, raw: Any) -> Any:
        """Convert a value that a client sent as text or JSON. :raises InvalidParams: names the allowed values."""
        if self.kind == "choice":
            if not isinstance(raw, str) or raw not in self.choices:
                raise InvalidParams(f"{self.name} takes one of: {', '.join(self.choices)}.")
            return raw
        what = "a whole number" if self.kind == "whole" else "a number"
        message = f"{self.name} takes {what} from {self.minimum:g} to {self.maximum:g}."
        if isinstance(raw, bool) or not isinstance(raw, int | float | str):
            raise InvalidParams(message)
        try:
            value = float(raw)
        except (ValueError, OverflowError) as error:
            raise InvalidParams(message) from error
        if not math.isfinite(value) or not (self.minimum or 0) <= value <= (self.maximum or 0):
            raise InvalidParams(message)
        if self.kind == "whole":
            if value != int(value):
                raise InvalidParams(message)
            return int(value)
        return value


def check_params(params: tuple[Param, ...], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Check parameters that a client sent; missing ones get their defaults.

    :raises InvalidParams: an unknown name or an invalid value; names the allowed ones.
    """
    known = {param.name: param for param in params}
    for name in raw:
        if name not in known:
            names = ", ".join(sorted(known)) or "none"
            raise InvalidParams(f"There is no parameter {str(name)[:64]!r}. Parameters: {names}.")
    return {name: param.check(raw[name]) if name in raw else param.default for name, param in known.items()}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much an output differs from the expected one."""

    #: Largest difference of a number.
    largest: float
    #: True if the entries that a client sees first have the same order, except for those that are closer together than
    #: the tolerance.
    is_same_order: bool


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """The input of a model. Known before the model is installed, from its row in the catalogue."""

    #: Height and width in pixels.
    height: int
    width: int
    #: Side of the centre square that is used, as a share of the shorter side; None takes the whole image.
    crop: float | None


class Service(Protocol):
    """One kind of work. An instance has no state; models are passed to it as artefacts and nets."""

    #: Its name in the registry, in chunk files and in the catalogue.
    name: str
    #: Its name for display.
    title: str
    #: What it does, one sentence.
    help: str
    #: Name of each input -> its description.
    inputs: Mapping[str, str]
    #: The parameters of a request.
    params: tuple[Param, ...]
    #: JSON schema of the output.
    output_schema: Mapping[str, Any]
    #: An example of an output.
    example: Any

    def load(self, artefact: Artefact, threads: int, precision: str) -> Any:
        """Load a model. The returned net may be run from several threads at once.

        :param precision: f32, bf16 or auto.
        :raises BrokenArtefact: the artefact cannot be loaded.
        """

    def resize(self, model_input: ModelInput, inputs: Mapping[str, bytes]) -> dict[str, bytes]:
        """Reduce inputs to the size that the model uses, without loss, to save bytes.

        Called before an item leaves the batcher's machine. `prepare` must return exactly the same for the result as for
        the originals. An input that cannot be reduced is returned as it is.

        :return: the inputs under the same names.
        :raises BadInput: as `prepare` with the originals, with the same message.
        """

    def prepare(self, artefact: Artefact, inputs: Mapping[str, bytes], *, is_resized: bool = False) -> Any:
        """Decode the inputs of an item. Needs no net, so it runs during the inference of other items.

        :param is_resized: the inputs are said to be what `resize` returned.
        :raises BadInput: the inputs cannot be used, or are not what `resize` returns.
        """

    def run(self, net: Any, item: Any) -> Any:
        """Run the net on what `prepare` returned, and return the output, JSON. :raises InferenceFailed:"""

    def check_params(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Check parameters; missing ones get their defaults. :raises InvalidParams:"""

    def check_output(self, artefact: Artefact, output: Any) -> None:
        """Check an output that a provider sent; nothing in it is trusted. :raises MalformedResults:"""

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return the part of a stored output that a client sees."""

    def compare(self, expected: Any, output: Any, tolerance: float) -> Difference:
        """Compare two outputs for the same item that both passed `check_output`."""
