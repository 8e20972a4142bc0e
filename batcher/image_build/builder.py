"""Builds the provider image with a container engine, and publishes it for Golem.

Called by `cli/image.py`. Building needs a source checkout: the Dockerfile installs mlg from its source at the versions
in constraints.txt, and an installed wheel contains neither. Golem's program `gvmkit-build` publishes the image.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from batcher.errors import ContainerImageError
from batcher.image_build.container_engine import find_engine
from batcher.image_build.context import check_checkout, find_intact_artefact, make_context
from batcher.image_build.lock import HASH, REPOSITORY, PublishedImage, add_to_lock, lock_file, read_lock
from provider_image.compiler import ensure_installed
from provider_image.environment import Settings, home_setting, setting
from provider_image.errors import ConfigError, MlgError
from provider_image.models.artefact import check_files, installed_digest, read_artefact
from provider_image.models.catalogue import CATALOGUE
from provider_image.models.registry import find_custom_name, find_row

_TAG = re.compile(r"[a-z0-9][a-z0-9._/:-]*[a-z0-9]:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
#: Backend that the image gets only for models that need it -> its package.
_BACKEND_PACKAGES = {"onnxruntime": "onnxruntime", "opencv": "opencv-python-headless"}
#: What Golem's runtime for images runs, as engines name it.
_ARCHITECTURE = "amd64"
#: Messages of gvmkit-build when it is not logged in, or cannot store a token.
_NOT_LOGGED_IN = re.compile(r"log ?in|credential|secure storage|unauthori[sz]ed|\b401\b", re.IGNORECASE)
_NO_ENGINE = re.compile(r"connect to docker", re.IGNORECASE)


def _repository(variable: str, text: str) -> str:
    if not REPOSITORY.fullmatch(text):
        raise ConfigError(f"{variable}={text!r} does not have the form user/repository, in lower case.")
    return text


@dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """Settings of `mlg image`."""

    #: Folder of the installed artefacts; in the home.
    models: Path = home_setting("models")
    #: The container engine, a name or a path; empty takes the first that works. MLG_IMAGE_ENGINE. Defaults to empty.
    engine: str = setting("MLG_IMAGE_ENGINE", "")
    #: user/repository on Golem's registry to publish to. MLG_IMAGE_REGISTRY. Defaults to empty.
    registry: str = setting("MLG_IMAGE_REGISTRY", "", parse=_repository)


def canonical_names(models: Path, spellings: Sequence[str]) -> list[str]:
    """Return the canonical names of catalogue and custom models, each once, in order.

    :param models: the folder of artefacts, where custom models are installed; they are not checked.
    :raises UnknownModel: there is no such model; names the most similar.
    """
    names = [find_custom_name(models, spelling) or find_row(models, spelling).name for spelling in spellings]
    return list(dict.fromkeys(names))


def image_tag(models: Sequence[str], tag: str | None = None) -> str:
    """Return the name of the container image for these models.

    :param tag: the requested name; without a `:` it gets `:latest`.
    :raises ConfigError: it is not a valid name.
    """
    chosen = tag or f"mlg-provider:{'-'.join(models)}"
    if ":" not in chosen.rpartition("/")[2]:
        chosen += ":latest"
    if not _TAG.fullmatch(chosen):
        problem = (
            "The names of these models are too long for a tag"
            if tag is None
            else f"{tag!r} is not a valid name of a container image"
        )
        raise ConfigError(f"{problem}. Set one in lower case: --tag NAME:TAG")
    return chosen


def build_image(
    models: Sequence[str],
    settings: ImageSettings,
    *,
    weights: Path | None = None,
    installed: bool = False,
    base: str | None = None,
    tag: str | None = None,
) -> tuple[str, dict[str, str]]:
    """Build the provider image with these models.

    Catalogue models that are not installed here are compiled in the build. Others are copied from the folder of
    artefacts, so that the image has the same digests as this machine; custom models, vision transformers, embeddings
    and methods, which are built here in a moment, always.

    The engine runs twice: the first run exports the compiled artefacts, and the second, which has everything cached,
    puts their digests into the labels. So the digests are those of the files in the image.

    :param weights: folder of weights files, from which all catalogue models are compiled; None downloads those that
        Keras publishes, for models that are not installed.
    :param installed: fail if a model is not installed, instead of compiling it.
    :param base: base image; None takes the Dockerfile's.
    :return: the image's name, and each model's digest.
    :raises MlgError: it cannot be built; says what to do.
    """
    names = canonical_names(settings.models, models)
    name = image_tag(names, tag)
    if installed and weights is not None:
        raise ConfigError("--installed compiles nothing, so --weights has no effect. Use only one of them.")
    if weights is not None and not weights.is_dir():
        raise ContainerImageError(f"There is no folder of weights {weights}. Create it with the weights files.")
    check_checkout()
    for model in names:
        if not installed and model in CATALOGUE and CATALOGUE[model].source == "method":
            ensure_installed(settings.models, model)
    copied_artefacts = [
        find_intact_artefact(settings.models, model)
        for model in names
        if installed
        or model not in CATALOGUE
        or CATALOGUE[model].base is not None
        or CATALOGUE[model].source in ("folder", "method")
        or (weights is None and installed_digest(settings.models, model) is not None)
    ]
    engine = find_engine(settings.engine)
    with tempfile.TemporaryDirectory(prefix="mlg-image-") as folder:
        context, artefacts = Path(folder, "context"), Path(folder, "artefacts")
        make_context(context, weights=weights, artefacts=copied_artefacts)
        arguments = {"MODEL": ",".join(names), "VERSION": _version()}
        backends = {artefact.backend for artefact in copied_artefacts} & _BACKEND_PACKAGES.keys()
        if backends:
            arguments["BACKENDS"] = " ".join(sorted(_BACKEND_PACKAGES[backend] for backend in backends))
        if base is not None:
            arguments["BASE"] = base
        engine.build(context, arguments, "--target", "artefacts", "--output", f"type=local,dest={artefacts}")
        digests = {model: _digest(artefacts / model) for model in names}
        arguments["DIGEST"] = ",".join(digests.values())
        engine.build(context, arguments, "--tag", name)
    return name, digests


def push_image(
    models: Sequence[str],
    settings: ImageSettings,
    *,
    tag: str | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> dict[str, PublishedImage]:
    """Publish the image with these models in Golem's registry, and record it in the home's lock file.

    :return: the published image, by model.
    :raises MlgError: it was not published and the lock file is unchanged; says what to do.
    """
    names = canonical_names(settings.models, models)
    name = image_tag(names, tag)
    if not settings.registry:
        raise ConfigError("Set where to publish, a repository in Golem's registry: MLG_IMAGE_REGISTRY=user/repository.")
    lock = lock_file(settings.models)
    read_lock(lock)  # so that a damaged file is reported before the upload
    program = shutil.which("gvmkit-build")
    if program is None:
        raise ContainerImageError(
            "gvmkit-build, which publishes images for Golem, is not installed. Install it: pip install gvmkit-build"
        )
    engine = find_engine(settings.engine)
    if engine.name == "buildah":
        raise ContainerImageError(
            f"gvmkit-build takes images from docker only. Copy it: buildah push {name} docker-daemon:{name}, "
            "then push with MLG_IMAGE_ENGINE=docker"
        )
    labels, architecture = engine.inspect(name)
    if architecture != _ARCHITECTURE:
        raise ContainerImageError(
            f"The image {name} is for {architecture}, but Golem's providers run {_ARCHITECTURE} only. "
            "Build it on such a machine."
        )
    digests = _labelled_digests(labels, name, names)
    target = f"{settings.registry}:{name.rpartition(':')[2]}"
    with tempfile.TemporaryDirectory(prefix="mlg-image-") as folder:
        file = Path(folder, "image.gvmi")
        output = _run_and_tee([program, name, "--push-to", target, "--output", str(file), "--hide-progress"], target)
        try:
            size = file.stat().st_size
            with file.open("rb") as handle:
                found = hashlib.file_digest(handle, "sha3_224").hexdigest()
        except OSError as error:
            raise ContainerImageError(f"gvmkit-build succeeded but wrote no image file: {error}") from error
    if found not in HASH.findall(output):
        raise ContainerImageError(
            f"gvmkit-build did not report that it published {found}, the hash of the image it made. "
            "Nothing was recorded. Update it (pip install --upgrade gvmkit-build) and push again."
        )
    now = clock().replace(microsecond=0)
    published = {
        model: PublishedImage(image=target, hash=found, digest=digest, size_bytes=size, pushed_at=now)
        for model, digest in digests.items()
    }
    add_to_lock(published, lock)
    return published


def _version() -> str:
    try:
        return version("mlg")
    except PackageNotFoundError:
        return ""


def _digest(folder: Path) -> str:
    try:
        artefact = read_artefact(folder)
        check_files(artefact)
    except MlgError as error:
        raise ContainerImageError(
            f"The build succeeded but produced no valid artefact of {folder.name}: {error}"
        ) from error
    return artefact.digest


def _labelled_digests(labels: Mapping[str, str], name: str, models: Sequence[str]) -> dict[str, str]:
    """Return the digests of these models from an image's labels. :raises ContainerImageError: one is not in it."""
    digests = dict(zip(labels.get("mlg.model", "").split(","), labels.get("mlg.digest", "").split(","), strict=False))
    absent = [model for model in models if not re.fullmatch(r"[0-9a-f]{64}", digests.get(model, ""))]
    if absent:
        raise ContainerImageError(
            f"The labels of the image {name} do not name the model {absent[0]}. "
            f"Build it again: mlg image build {' '.join(models)} --tag {name}"
        )
    return {model: digests[model] for model in models}


def _run_and_tee(command: list[str], target: str) -> str:
    """Run gvmkit-build, copy its output to standard error as it comes, prompts included, and return the output."""
    output = bytearray()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while data := os.read(process.stdout.fileno(), 65536):
            output += data
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()
    text = output.decode("utf-8", "replace")
    if process.returncode:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("Error:")), lines[-1] if lines else "")
        if _NO_ENGINE.search(reason):
            remedy = "It needs a docker service: start docker, or podman (podman system service) with DOCKER_HOST set."
        elif _NOT_LOGGED_IN.search(reason):
            remedy = "Log in: gvmkit-build --login, or set REGISTRY_USER and REGISTRY_TOKEN."
        else:
            remedy = "Nothing was recorded; push again."
        raise ContainerImageError(f"gvmkit-build did not publish {target}. {remedy} Its output: {reason}")
    return text
