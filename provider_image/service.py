"""The interface of a service: one kind of work, described once.

Validation, forms, the API description, help texts and the contract test are derived from it. The server uses its
inputs, parameters and views, the batcher checks outputs with it, the runtime runs it. A new service is one file in
`services/`, or a class of another package (see docs/contributing.md).
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from provider_image.errors import BadInput, InvalidParams, MalformedResults
from provider_image.images import headers
from provider_image.images.headers import MEDIA_TYPES, read_header
from provider_image.schemas import MAX_BYTES

if TYPE_CHECKING:
    from provider_image.backends import Device, Net
    from provider_image.models.artefact import Artefact

#: The output file with this name is the image that answers a request.
IMAGE_ANSWER = "image"
#: What image/* stands for in an output.
_IMAGE_OUTPUTS = ("image/jpeg", "image/png", "image/webp")
#: Most pixels of an image in an output.
_MAX_OUTPUT_PIXELS = 100_000_000
#: Most values of a JSON file in an output, as its commas, colons and brackets say: each takes some 70 bytes to check.
MAX_JSON_VALUES = 1_000_000
#: Text is checked in pieces of this size.
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Input:
    """An input of a service. The first of a service is not optional; the others are the same for a whole batch."""

    #: image (its header is checked), row (a JSON object of plain values, a row of a table), text (UTF-8) or file (any
    #: bytes).
    kind: str
    #: One sentence of help.
    help: str
    #: Media types that clients may name when they send it as a raw body; image/* stands for all images.
    media_types: tuple[str, ...]
    #: Most bytes; the server's own limit applies as well.
    max_bytes: int
    #: True if a request may leave it out.
    is_optional: bool = False


#: The input of services that take one image.
IMAGE_INPUT = Input(
    kind="image",
    help="The image: JPEG, PNG, WebP, GIF, BMP or TIFF.",
    media_types=("image/*",),
    max_bytes=MAX_BYTES,
)


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """A file that a service returns beside its JSON."""

    #: One sentence of help.
    help: str
    #: image/jpeg, image/png, image/webp, image/* (any of these), application/json (UTF-8, of at most MAX_JSON_VALUES),
    #: text/plain (UTF-8) or application/octet-stream (anything).
    media_type: str
    #: Most bytes.
    max_bytes: int
    #: True if an output may lack it.
    is_optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a service returns for one item."""

    #: JSON that fits the service's `output_schema`.
    data: Any
    #: The files of the service's `outputs`, by name.
    files: Mapping[str, bytes] = field(default_factory=dict)


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
    #: True if it is the seconds after which the run ends by itself; the batcher lowers it to what a chunk may take. The
    #: output then says by a field `complete` whether they were enough.
    is_time_limit: bool = False

    def check(self, raw: Any) -> Any:
        """Convert a value that a client sent as text or JSON. :raises InvalidParams: names the allowed values."""
        if self.kind == "choice":
            if not isinstance(raw, str) or raw not in self.choices:
                raise InvalidParams(f"{self.name} takes one of: {', '.join(self.choices)}.")
            return raw
        is_whole = self.kind == "whole"
        try:
            value = math.nan if isinstance(raw, bool) else float(raw)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not (self.minimum or 0) <= value <= (self.maximum or 0) or (is_whole and value != int(value)):
            what = "a whole number" if is_whole else "a number"
            raise InvalidParams(f"{self.name} takes {what} from {self.minimum:g} to {self.maximum:g}.")
        return int(value) if is_whole else value


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


def limit_seconds(params: tuple[Param, ...], values: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Lower the values of parameters that are time limits to some seconds, as far as their ranges allow."""
    limits = {param.name: max(seconds, param.minimum or 0) for param in params if param.is_time_limit}
    return {name: min(value, limits[name]) if name in limits else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much an output differs from the expected one."""

    #: Largest difference of a number; of two vectors, the length of their difference.
    largest: float
    #: What it is a share of; among the outputs of a self-test, the largest counts for all: a number near 0 may be what
    #: is left of large terms, so a share of it alone would say little.
    scale: float = 1.0
    #: True if the entries that a client sees first have the same order, except for those that are closer together than
    #: the tolerance.
    is_same_order: bool


class Service(Protocol):
    """One kind of work. An instance has no state; models are passed to it as artefacts and nets."""

    #: Its name in the registry, in chunk files and in the catalogue.
    name: str
    #: Its name for display.
    title: str
    #: What it does, one sentence.
    help: str
    #: Name of each input -> its description.
    inputs: Mapping[str, Input]
    #: The parameters of a request. Those that are not read-time reach `prepare` and `run` with every chunk.
    params: tuple[Param, ...]
    #: Name of each output file, as in chunk files -> its description.
    outputs: Mapping[str, OutputFile]
    #: JSON schema of the output's JSON.
    output_schema: Mapping[str, Any]
    #: An example of it.
    example: Any

    def load(self, artefact: Artefact, device: Device) -> Net:
        """Load a model. The returned net may be run from several threads at once.

        :raises BrokenArtefact: the artefact cannot be loaded.
        """

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> Any:
        """Decode the inputs of an item. Needs no net, so it runs during the inference of other items.

        :param is_resized: images are said to have been resized to the model's input, see `images/resizing.py`. Must
            return exactly the same for them as for the originals.
        :raises BadInput: the inputs cannot be used, or are not resized.
        """

    def run(self, net: Net, items: Sequence[Any], params: Sequence[Mapping[str, Any]]) -> Sequence[Output]:
        """Run the net on what `prepare` returned, at most `net.batch_items` of it, and return an output for each.

        A service that takes seconds calls `report_progress` of `progress.py` meanwhile.

        :raises InferenceFailed: if there are several items, each is then run alone.
        """

    def check_output(self, artefact: Artefact, params: Mapping[str, Any], output: Output) -> None:
        """Check an output that a provider sent; nothing in it is trusted. Its files have passed `check_files`.

        :raises MalformedResults:
        """

    def compare(self, expected: Output, output: Output, tolerance: float) -> Difference:
        """Compare two outputs for the same item that both passed `check_output`.

        :param expected: that of a self-test may lack files that were not recorded.
        """

    def view(self, output: Any, params: Mapping[str, Any]) -> Any:
        """Return the part of a stored output's JSON that a client sees."""


def primary_input(service: Service) -> str:
    """Return the name of the input that every request has."""
    return next(iter(service.inputs))


def describe_inputs(inputs: Mapping[str, Input]) -> str:
    """Name the inputs of a service and what they are, for messages."""
    return ", ".join(f"`{name}` ({one.kind}{', optional' * one.is_optional})" for name, one in inputs.items())


def are_inputs(service: Service, names: Iterable[str]) -> bool:
    """Tell whether a request may consist of these inputs: no unknown one, and none missing that is not optional."""
    given = set(names)
    return given <= service.inputs.keys() and all(
        one.is_optional or name in given for name, one in service.inputs.items()
    )


def check_files(outputs: Mapping[str, OutputFile], files: Mapping[str, bytes]) -> None:
    """Check the names, sizes and contents of the files of an output. :raises MalformedResults:"""
    missing = sorted(name for name, one in outputs.items() if name not in files and not one.is_optional)
    unknown = sorted(files.keys() - outputs.keys())
    if missing or unknown:
        raise MalformedResults(f"The output has the unknown files {unknown} and lacks {missing}.")
    for name, data in files.items():
        if len(data) > outputs[name].max_bytes:
            raise MalformedResults(f"The file {name} has {len(data)} bytes, at most {outputs[name].max_bytes} allowed.")
        if not _has_type(data, outputs[name].media_type):
            raise MalformedResults(f"The file {name} is not {outputs[name].media_type}.")


def media_type_of(one: OutputFile, data: bytes) -> str:
    """Return the media type of a file that passed `check_files`."""
    return headers.media_type(data) if one.media_type == "image/*" else one.media_type


def _has_type(data: bytes, media_type: str) -> bool:
    try:
        if media_type.startswith("image/"):
            # It is not decoded here.
            header = read_header(data, _MAX_OUTPUT_PIXELS, max_decoding_bytes=math.inf, max_side=math.inf)
            found = MEDIA_TYPES[header.format]
            return found == media_type or (media_type == "image/*" and found in _IMAGE_OUTPUTS)
        if media_type == "application/json":
            _check_json(data)
        elif media_type == "text/plain":
            decoder = codecs.getincrementaldecoder("utf-8")()
            for start in range(0, len(data), _PIECE_BYTES):
                decoder.decode(data[start : start + _PIECE_BYTES])
            decoder.decode(b"", final=True)
    except (BadInput, ValueError, RecursionError):
        return False
    return media_type in ("application/json", "text/plain", "application/octet-stream")


def _check_json(data: bytes) -> None:
    """Check that a file is JSON of a size that can be parsed. :raises ValueError, RecursionError: it is not."""
    # No value is without one of these, but the first.
    if sum(map(data.count, (b",", b":", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ValueError("too many values")
    json.loads(data.decode(), object_pairs_hook=len)  # objects are not kept
