"""The base of all errors, and those that occur on a provider, cross to it or describe its input and models.

    MlgError
    ├── BadInput                 the client's image or parameters; never retried
    │   ├── EmptyImage
    │   ├── NotAnImage
    │   ├── UnsupportedFormat
    │   ├── BrokenImage
    │   ├── ImageTooLarge        too many pixels
    │   ├── TooManyBytes
    │   ├── NotARow
    │   ├── NotAText
    │   ├── InvalidParams
    │   └── MalformedRequest
    ├── UnknownModel
    ├── NotInstalled
    ├── ModelError               the model, not the image
    │   ├── BrokenArtefact
    │   ├── WeightsMismatch
    │   ├── WeightsMissing
    │   ├── CompilerMissing
    │   ├── CompilationFailed
    │   ├── UnsafeModelFile
    │   └── UnsuitableModel
    ├── ChunkError               a chunk, on its way to a worker and back
    │   ├── MalformedChunk
    │   ├── MalformedResults
    │   ├── WorkerDied
    │   └── ChunkTimeout
    ├── InferenceFailed          one item
    └── ConfigError

`store/errors.py`, `server/errors.py` and `batcher/errors.py` define the errors of those packages on top of these. The
HTTP status of each is in the server. A class's docstring is its default message and says what to do. `code` is for
programs (in HTTP responses and results files); `permanent` means that a retry cannot succeed.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any

#: What readers of files raise for damaged or manipulated ones, according to their code and to fuzzing reports.
DAMAGED_FILE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
)
#: Between the code of a base and that of an error of another package, in replies.
_BASE_END = "__"
#: What `schemas.py` accepts as a code.
_MAX_CODE_LENGTH = 64


class MlgError(Exception):
    """Something went wrong in mlg."""

    #: The identifier for programs: the class's name in snake case, unless the class gives another. A class that is
    #: renamed gives its former code, because programs rely on it.
    code = "error"
    #: True when a retry cannot succeed.
    permanent = False

    def __init_subclass__(cls) -> None:
        if "code" not in vars(cls):
            cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or " ".join((type(self).__doc__ or "").split()))

    @property
    def reason(self) -> str:
        """Return the message."""
        return str(self)

    def to_reply(self) -> dict[str, Any]:
        """Return what crosses the wire; see `error_from_reply`.

        The code of an error of another package comes after that of its base in this module, which every reader knows.
        """
        base = next(kind for kind in type(self).__mro__ if issubclass(kind, MlgError) and kind.__module__ == __name__)
        both = f"{base.code}{_BASE_END}{self.code}"
        code = self.code if base is type(self) else both if len(both) <= _MAX_CODE_LENGTH else base.code
        return {"code": code, "reason": self.reason, "permanent": self.permanent}


class BadInput(MlgError):
    """The input cannot be used. Send an image that opens in an image viewer."""

    permanent = True


class EmptyImage(BadInput):
    """The image is empty. Send the bytes of the file, for example: curl -F image=@kitten.jpg URL"""


class NotAnImage(BadInput):
    """The bytes are not an image. Send a JPEG, PNG, WebP, GIF, BMP or TIFF file."""


class UnsupportedFormat(BadInput):
    """This image format is not supported. Send JPEG, PNG, WebP, GIF, BMP or TIFF."""


class BrokenImage(BadInput):
    """The image is cut short or damaged. Save it again in an image program and send that file."""


class ImageTooLarge(BadInput):
    """The image has too many pixels. Scale it down and send it again."""

    code = "too_many_pixels"


class TooManyBytes(BadInput):
    """The image file is too large. Send at most 16 MB: a smaller size or a stronger JPEG compression helps."""

    code = "too_large"


class NotARow(BadInput):
    """The table row cannot be used. Send a JSON object with a plain value for each column, like {"length": 5.1}."""


class NotAText(BadInput):
    """The text cannot be used. Send some words, as UTF-8."""


class InvalidParams(BadInput):
    """A parameter has a value that the service does not accept."""


class MalformedRequest(BadInput):
    """The request cannot be read. Send the image as the multipart field `image` or as the raw body."""


class UnknownModel(MlgError):
    """There is no such model. `mlg models` and GET /models list the models."""

    permanent = True


class NotInstalled(MlgError):
    """The model is not installed here."""


class ModelError(MlgError):
    """The model cannot be used."""

    permanent = True


class WeightsMismatch(ModelError):
    """The weights file does not match its hash or its model. Download it again, then: mlg models compile MODEL"""


class WeightsMissing(ModelError):
    """The weights file was not found."""


class CompilerMissing(ModelError):
    """Compiling Keras models needs tensorflow. Install it: pip install "mlg[compile]" """


class CompilationFailed(ModelError):
    """The compiled graph gives other results than the model that it was made from."""


class UnsafeModelFile(ModelError):
    """The model file tries to run code or to read other files. Save the model with Keras' own layers only."""


class UnsuitableModel(ModelError):
    """The model is not a classifier of one RGB image."""


class BrokenArtefact(ModelError):
    """The model artefact is incomplete or damaged. Delete its folder, then: mlg models compile MODEL"""


class ChunkError(MlgError):
    """The chunk could not be processed."""


class MalformedChunk(ChunkError):
    """The chunk file cannot be read."""

    permanent = True


class MalformedResults(ChunkError):
    """The results file does not match the chunk, or cannot be read."""


class DecodingUnavailable(MlgError):
    """Images cannot be decoded now: no process for it can be started. Try again later; see the log."""


class WorkerDied(ChunkError):
    """The worker process ended before it had written its results."""


class ChunkTimeout(ChunkError):
    """The chunk took longer than its time limit."""


class InferenceFailed(MlgError):
    """The model failed on this item."""

    @staticmethod
    def from_exception(error: Exception) -> MlgError:
        """Return an MlgError as it is, and one for any other exception, which is a bug in a service or a library."""
        if isinstance(error, MemoryError):
            return InferenceFailed("It takes more memory than it may. Scale it down and send it again.")
        return error if isinstance(error, MlgError) else InferenceFailed(f"{type(error).__name__}: {error}")


class ConfigError(MlgError):
    """A setting has a value that cannot be used."""

    permanent = True


def error_from_reply(reply: Mapping[str, Any]) -> MlgError:
    """Rebuild the error from what `to_reply` returned, elsewhere.

    A class that is not loaded here becomes its base in this module, an unknown code a ChunkError.
    """
    kinds: list[type[MlgError]] = [MlgError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    base, _, own = str(reply.get("code")).rpartition(_BASE_END)
    found = next((kind for code in (own, base) for kind in kinds if kind.code == code), ChunkError)
    return found(str(reply.get("reason", "")) or None)
