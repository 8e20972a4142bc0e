"""The one tree of errors.

    MlgError
    ├── BadInput                 the caller's picture or parameters; never retried
    │   ├── EmptyImage
    │   ├── NotAnImage
    │   ├── UnsupportedFormat
    │   ├── BrokenImage
    │   ├── ImageTooLarge        too many pixels
    │   ├── TooManyBytes
    │   ├── InvalidParams
    │   ├── MalformedRequest
    │   └── UnsupportedMediaType
    ├── UnknownModel
    ├── UnknownRequest
    ├── UnknownProvider          in store/providers.py, beside the only ones who raise it
    ├── NotInstalled
    ├── NotCancellable
    ├── NotRetryable
    ├── BacklogFull
    ├── ServerUnreachable
    ├── ModelError               the artefact, not the picture
    │   ├── WeightsMismatch
    │   ├── WeightsMissing
    │   ├── CompilerMissing
    │   ├── CompilationFailed
    │   ├── UnsafeModelFile
    │   ├── UnsuitableModel
    │   └── BrokenArtefact
    ├── ChunkError               what crosses to a provider and back
    │   ├── MalformedChunk
    │   ├── MalformedResults
    │   ├── WorkerDied
    │   ├── ChunkTimeout
    │   └── ShrinkingUnavailable
    ├── InferenceFailed
    ├── ImageError               a container image
    ├── ExecutorUnavailable      nobody can work on it now; nobody's fault
    │   ├── NoProvider
    │   ├── BudgetReached
    │   └── GolemUnavailable
    ├── AccessRefused, LimitReached, FetchFailed, and a BadInput more: in server/errors.py
    ├── UnknownKey, KeyNameTaken in store/keys.py
    ├── StoreError
    │   ├── StoreBusy
    │   ├── StoreUnavailable
    │   └── DiskFull
    └── ConfigError

Every room raises these; the ground floor holds them because it is the one that every other room may import.
A class's docstring is its default message and tells the cure. `code` is the word that machines read (in HTTP answers
and in results files), `permanent` says that trying again cannot help.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class MlgError(Exception):
    """Something went wrong in mlg."""

    #: The word for machines; stays the same when the sentence is improved.
    code = "error"
    #: True when another attempt cannot end differently.
    permanent = False

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or " ".join((type(self).__doc__ or "").split()))

    @property
    def reason(self) -> str:
        """Return the sentence for people."""
        return str(self)


class BadInput(MlgError):
    """The input cannot be used. Send a picture that opens in an image viewer."""

    code = "bad_input"
    permanent = True


class EmptyImage(BadInput):
    """The picture is empty. Send the image's bytes, for example: curl -F image=@kitten.jpg URL"""

    code = "empty_image"


class NotAnImage(BadInput):
    """The bytes are not an image. Send a JPEG, PNG, WebP, GIF, BMP or TIFF file."""

    code = "not_an_image"


class UnsupportedFormat(BadInput):
    """This image format is not supported. Send JPEG, PNG, WebP, GIF, BMP or TIFF."""

    code = "unsupported_format"


class BrokenImage(BadInput):
    """The image is cut short or damaged. Save it again in an image program and send that file."""

    code = "broken_image"


class ImageTooLarge(BadInput):
    """The image has too many pixels. Scale it down and send it again."""

    code = "too_many_pixels"


class TooManyBytes(BadInput):
    """The image file is too large. Send at most 2 MB: a smaller size or a stronger JPEG compression helps."""

    code = "too_large"


class InvalidParams(BadInput):
    """A parameter has a value that the service does not take."""

    code = "invalid_params"


class MalformedRequest(BadInput):
    """The request cannot be read. Send the picture as the multipart field `image` or as the raw body."""

    code = "malformed_request"


class UnknownModel(MlgError):
    """There is no such model. `mlg models` and GET /models list those there are."""

    code = "unknown_model"
    permanent = True


class NotInstalled(MlgError):
    """The model is not installed here."""

    code = "not_installed"


class ServerUnreachable(MlgError):
    """The server does not answer. Start it with: mlg serve"""

    code = "server_unreachable"


class ModelError(MlgError):
    """The model cannot be used."""

    code = "model_error"


class WeightsMismatch(ModelError):
    """The weights file does not match its hash or its model. Get the file again, then: mlg models compile MODEL"""

    code = "weights_mismatch"
    permanent = True


class WeightsMissing(ModelError):
    """The weights file is not there."""

    code = "weights_missing"
    permanent = True


class CompilerMissing(ModelError):
    """Compiling Keras models needs tensorflow. Install it: pip install "mlg[compile]" """

    code = "compiler_missing"
    permanent = True


class CompilationFailed(ModelError):
    """The compiled graph does not answer as the model that it was made from."""

    code = "compilation_failed"
    permanent = True


class UnsafeModelFile(ModelError):
    """The model file asks to run code or to read other files. Save the model with Keras' own layers only."""

    code = "unsafe_model_file"
    permanent = True


class UnsuitableModel(ModelError):
    """The model is not a classifier of one RGB picture."""

    code = "unsuitable_model"
    permanent = True


class BrokenArtefact(ModelError):
    """The model artefact is incomplete or damaged. Delete its folder, then: mlg models compile MODEL"""

    code = "broken_artefact"
    permanent = True


class ChunkError(MlgError):
    """The chunk could not be processed."""

    code = "chunk_error"


class MalformedChunk(ChunkError):
    """The chunk file cannot be read."""

    code = "malformed_chunk"
    permanent = True


class MalformedResults(ChunkError):
    """The results file is not what was asked for."""

    code = "malformed_results"


class WorkerDied(ChunkError):
    """The worker process ended before it had written its results."""

    code = "worker_died"


class ChunkTimeout(ChunkError):
    """The chunk took longer than its time limit."""

    code = "chunk_timeout"


class InferenceFailed(MlgError):
    """The model failed on this item."""

    code = "inference_failed"


class ConfigError(MlgError):
    """A setting has a value that cannot be used."""

    code = "config_error"
    permanent = True


def error_from_reply(reply: Mapping[str, Any]) -> MlgError:
    """Turn a reply that is not ok back into the error it was made of."""
    kinds: list[type[MlgError]] = [MlgError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    found = next((kind for kind in kinds if kind.code == reply.get("code")), ChunkError)
    return found(str(reply.get("reason", "")) or None)
