"""The weights files of `keras.applications`: found in a file, a folder or Keras' cache, or downloaded.

Also finds the folders of vision transformers. Called by `mlg models compile`. Downloads trust the system's TLS
certificates. Must not import keras, which takes seconds: missing weights are reported first.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import secrets
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from provider_image.environment import Environment
from provider_image.errors import WeightsMismatch, WeightsMissing
from provider_image.models.catalogue import ModelFacts, ModelRow, PublishedWeights

#: The URL where Keras publishes weights; `ModelRow.weights.address` is below it.
KERAS_WEIGHTS_URL = "https://storage.googleapis.com/tensorflow/keras-applications/"
#: Timeout of a download, in seconds without data.
_READ_TIMEOUT_SECONDS = 30.0
_BLOCK_BYTES = 1024 * 1024
#: Most bytes of a download. The largest published file, VGG19's, has 575 MB.
_MAX_BYTES = 2_000_000_000

#: Called with the received and the total bytes; the total is 0 if the server does not send it.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A weights file that was found."""

    path: Path
    #: Digest of the file, which is part of the artefact's digest.
    sha256: str
    #: True if it is the file that Keras publishes, by its hash.
    is_published: bool


@dataclass(frozen=True, kw_only=True)
class WeightsSources:
    """The places to look for weights, in this order."""

    #: A file, or a folder that must contain it; None tries the places below.
    given: Path | None = None
    #: A folder that may contain it. MLG_WEIGHTS_DIR.
    folder: Path | None = None
    #: Keras' cache, to which downloads are saved, too.
    cache: Path
    #: The URL to download from. MLG_WEIGHTS_URL. Defaults to that of Keras.
    address: str = KERAS_WEIGHTS_URL

    @classmethod
    def from_env(cls, variables: Mapping[str, str], *, given: Path | None = None) -> WeightsSources:
        """Read the settings. KERAS_HOME is a setting of Keras."""
        env = Environment(variables)
        return cls(
            given=given,
            folder=env.path("MLG_WEIGHTS_DIR", "") if env.text("MLG_WEIGHTS_DIR", "") else None,
            cache=env.path("KERAS_HOME", "~/.keras") / "models",
            address=env.text("MLG_WEIGHTS_URL", KERAS_WEIGHTS_URL),
        )


def find_weights(
    row: ModelRow, sources: WeightsSources, *, progress: Progress = lambda done, total: None
) -> WeightsFile:
    """Find or download the weights of a model.

    :raises WeightsMissing: they cannot be found; names the file to get, its URL, and where to put it.
    :raises WeightsMismatch: the download is not what Keras publishes.
    """
    assert row.weights is not None
    if sources.given is not None and not sources.given.is_dir():
        if not sources.given.is_file():
            raise WeightsMissing(f"There is no weights file {sources.given}.")
        return _weights_file(sources.given, row.weights)
    for folder in (sources.given, sources.folder):
        if folder is not None:
            for path in (folder / name for name in _candidate_names(row)):
                if path.is_file():
                    return _weights_file(path, row.weights)
        if folder is not None and folder == sources.given:
            raise WeightsMissing(
                f"{folder} has no weights of {row.title}. Put {' or '.join(_candidate_names(row))} there."
            )
    cached = sources.cache / row.weights.file
    if cached.is_file():
        found = _weights_file(cached, row.weights)
        if found.is_published or row.weights.hash is None:
            return found
    if row.weights.hash is None:
        raise WeightsMissing(
            f"Keras publishes no hash for the weights of {row.title}, so they are not downloaded automatically. Get "
            f"{sources.address}{row.weights.address} and run: mlg models compile {row.name} --weights FILE"
        )
    _download(row, sources, cached, progress)
    return _weights_file(cached, row.weights)


def find_folder(row: ModelFacts, sources: WeightsSources) -> Path:
    """Find the folder of a vision transformer. :raises WeightsMissing: there is none; says where it was looked for."""
    candidates = _candidate_folders(row, sources)
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    places = f" It is not in {' or '.join(map(str, candidates))}." if candidates else ""
    raise WeightsMissing(
        f"{row.title} is built from a folder that Hugging Face's library saved, with config.json and model.safetensors."
        f"{places} Give it: mlg models compile {row.name} --weights FOLDER"
    )


def has_folder(row: ModelFacts, sources: WeightsSources) -> bool:
    """Tell whether the folders of weights have one with the name of the model."""
    return any((folder / "config.json").is_file() for folder in _candidate_folders(row, sources)[-1:])


def _candidate_folders(row: ModelFacts, sources: WeightsSources) -> list[Path]:
    """List where the folder of a vision transformer may be: it is given, or has the name of the model."""
    if sources.given is not None:
        return [sources.given, sources.given / row.name]
    return [] if sources.folder is None else [sources.folder / row.name]


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()


def _algorithm(hash: str) -> str:
    return "sha256" if len(hash) == 64 else "md5"


def _candidate_names(row: ModelRow) -> list[str]:
    """List the possible names of the file in a folder: in Keras' cache, as published, and NAME.weights.h5."""
    assert row.weights is not None
    published = row.weights.address.rpartition("/")[2]
    return list(dict.fromkeys([row.weights.file, published, f"{row.name}.weights.h5"]))


def _weights_file(path: Path, published: PublishedWeights) -> WeightsFile:
    try:
        sha256, hash = _digest(path, "sha256"), published.hash
        is_published = hash is not None and _digest(path, _algorithm(hash)) == hash
    except OSError as error:
        raise WeightsMissing(f"The weights file {path} cannot be read: {error.strerror or error}") from error
    return WeightsFile(path=path, sha256=sha256, is_published=is_published)


def _download(row: ModelRow, sources: WeightsSources, target: Path, progress: Progress) -> None:
    """Download to a temporary file beside the target, compare the hash, and rename it to the target."""
    assert row.weights is not None and row.weights.hash is not None
    url = f"{sources.address.rstrip('/')}/{row.weights.address}"
    hint = (
        f"Get {url} on a machine that can reach it, put it into a folder as {row.weights.file}, and run: "
        f"mlg models compile {row.name} --weights FOLDER (or set MLG_WEIGHTS_DIR)."
    )
    digest = hashlib.new(_algorithm(row.weights.hash))
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        context = ssl.create_default_context()
        with (
            partial.open("xb") as file,
            urllib.request.urlopen(url, timeout=_READ_TIMEOUT_SECONDS, context=context) as response,
        ):
            total, done = int(response.headers.get("Content-Length") or 0), 0
            while block := response.read(_BLOCK_BYTES):
                digest.update(block)
                file.write(block)
                done += len(block)
                progress(done, total)
                if done > _MAX_BYTES:
                    raise WeightsMismatch(f"{url} has more than {_MAX_BYTES} bytes. {hint}")
            if total and done < total:
                raise WeightsMissing(f"{url} ended after {done} of {total} bytes. Try again. {hint}")
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != row.weights.hash:
            raise WeightsMismatch(f"The file from {url} does not have the hash that Keras publishes. {hint}")
        partial.replace(target)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: an invalid URL
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise WeightsMissing(f"The weights of {row.title} cannot be downloaded ({reason}). {hint}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
