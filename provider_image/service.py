"""What a service is: one kind of work on pictures, described once.

From one such object come validation, forms, the API description, help texts and the contract test. The server asks it
about parameters and views, the batcher about outputs, the runtime makes it work. Adding one is a file in `services/`.
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
    """A parameter that a client may set."""

    #: The name in query strings, forms and chunk files.
    name: str
    #: One of whole, number, choice.
    kind: str
    #: What it is when the client says nothing.
    default: Any
    #: Range of a whole or number, both ends included.
    minimum: float | None = None
    maximum: float | None = None
    #: What a choice may be.
    choices: tuple[str, ...] = ()
    #: One sentence for people.
    help: str
    #: True if it only changes how a stored output is shown, so that it never goes to a provider.
    is_read_time: bool = False

    def check(self, raw: Any) -> Any:
        """Turn what a client sent, text or JSON, into a value. :raises InvalidParams: says what it takes."""
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
    """Check what a client sent against a service's parameters; what is missing gets its default.

    :raises InvalidParams: an unknown name or a bad value; says what is taken.
    """
    known = {param.name: param for param in params}
    for name in raw:
        if name not in known:
            taken = ", ".join(sorted(known)) or "none"
            raise InvalidParams(f"There is no parameter {str(name)[:64]!r}. Parameters: {taken}.")
    return {name: param.check(raw[name]) if name in raw else param.default for name, param in known.items()}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far an output is from the one that was expected."""

    #: Largest difference of a number in it.
    largest: float
    #: True if what a client sees first stands in the same order; those nearer together than the tolerance may change
    #: places.
    is_same_order: bool


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """What a model takes. Known before it is installed: its artefact and its row in the catalogue say the same."""

    #: Height and width in pixels.
    height: int
    width: int
    #: Side of the centre square that is used, as a share of the shorter side; None takes the whole picture.
    crop: float | None


class Service(Protocol):
    """One kind of work. An instance has no state of its own: models come in as artefacts and nets."""

    #: The name in the registry, in chunk files and in the catalogue.
    name: str
    #: The name for people.
    title: str
    #: What it does, one sentence.
    help: str
    #: Input name -> what it is.
    inputs: Mapping[str, str]
    #: What a client may set.
    params: tuple[Param, ...]
    #: JSON schema of the output.
    output_schema: Mapping[str, Any]
    #: An output as it may look.
    example: Any

    def load(self, artefact: Artefact, threads: int, precision: str) -> Any:
        """Load a model once; the net that comes back may be run from several threads at once.

        :param precision: f32, bf16 or auto.
        :raises BrokenArtefact: the artefact cannot be loaded.
        """

    def resize(self, model_input: ModelInput, inputs: Mapping[str, bytes]) -> dict[str, bytes]:
        """Reduce what a client sent to what the model sees of it, as small as can be and without any loss.

        Called before an item leaves the batcher's machine. `prepare` must make exactly the same of it as of the
        originals; an input that has nothing to lose stays as it is.

        :return: under the same names.
        :raises BadInput: as `prepare` with the originals, in the same words.
        """

    def prepare(self, artefact: Artefact, inputs: Mapping[str, bytes], *, is_resized: bool = False) -> Any:
        """Decode an item's inputs; needs no net, so that it runs beside another item's inference.

        :param is_resized: the inputs are what `resize` gave, or claim to be.
        :raises BadInput: the inputs cannot be used, or are not what `resize` would give.
        """

    def run(self, net: Any, item: Any) -> Any:
        """Run the net on what `prepare` gave, and return the output, JSON. :raises InferenceFailed:"""

    def check_params(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Check parameters; what is missing gets its default. :raises InvalidParams:"""

    def check_output(self, artefact: Artefact, output: Any) -> None:
        """Check an output that came from a provider; nothing about it is trusted. :raises MalformedResults:"""

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return what a client sees of a stored output."""

    def compare(self, expected: Any, output: Any, tolerance: float) -> Difference:
        """Compare two outputs for the same item that both passed `check_output`."""
