"""The self-test of models that transfer styles, which take two images. Called by their builders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from provider_image.backends import Device
from provider_image.compiler.installing import install, with_files
from provider_image.compiler.self_test import self_test_images
from provider_image.compiler.verification import write_samples
from provider_image.errors import CompilationFailed, InferenceFailed
from provider_image.images.outputs import encode_image
from provider_image.models.artefact import Artefact
from provider_image.service import check_params
from provider_image.services import load_service
from provider_image.services.style_transfer import IMAGE, STYLE
from provider_image.style.pixels import load_pixels

#: Longest side of the images, so that a check takes seconds.
_SIDE = 32
_STYLE_FILE = "selftest-style.png"


def install_style(draft: Artefact, folder: Path, models: Path, files: Sequence[str]) -> Artefact:
    """Run a model on its self-test, and install it with the result.

    :param folder: has the backend's files; in the folder from `installing.build_folder`.
    :param files: their names.
    :raises CompilationFailed: it cannot be run.
    """
    unverified = with_files(replace(draft, folder=folder), files)
    service = load_service(draft.service)
    content, style = (
        encode_image(load_pixels(each, _SIDE, _SIDE**2), "png") for each in list(self_test_images().values())[:2]
    )
    params = check_params(service.params, {})
    try:
        net = service.load(unverified, Device(threads=1))
        item = service.prepare(unverified, {IMAGE: content, STYLE: style}, params)
        outputs = service.run(net, [item], [params])
    except InferenceFailed as error:
        raise CompilationFailed(f"{error.reason} It was not installed.") from error
    (sample,) = write_samples(folder, {"selftest-0.png": content}, outputs)
    (folder / _STYLE_FILE).write_bytes(style)
    inputs = {STYLE: (_STYLE_FILE, hashlib.sha256(style).hexdigest())}
    return install(replace(unverified, samples=(replace(sample, inputs=inputs),)), folder, models, files)
