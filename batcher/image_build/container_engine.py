"""The container engine of this machine: docker, podman or buildah, whichever is there and works.

Used by `images.py`. The engine's own output goes to standard error as it comes, so that standard output is ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from batcher.errors import ContainerImageError
from provider_image.errors import ConfigError

#: Engine -> arguments that succeed only when it works, in the order of preference.
_PROBES: Mapping[str, Sequence[str]] = {
    "docker": ("version", "--format", "{{.Server.Version}}"),
    "podman": ("info",),
    "buildah": ("info",),
}
#: A service that hangs must not hang us.
_PROBE_SECONDS = 30.0
_STANDARD_ERROR = 2


@dataclass(frozen=True, kw_only=True)
class ContainerEngine:
    """An engine that works."""

    #: docker, podman or buildah.
    name: str
    #: The program, as it is started.
    program: str

    def build(self, context: Path, arguments: Mapping[str, str], *options: str) -> None:
        """Build the Dockerfile `provider_image/Dockerfile` of a context.

        :param arguments: the Dockerfile's.
        :param options: further options, equal for all engines.
        :raises ContainerImageError: the engine failed; it has said why on standard error.
        """
        # Without --layers buildah would compile the models anew in every build.
        start = ["bud", "--layers"] if self.name == "buildah" else ["build"]
        given = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
        file = str(context / "provider_image" / "Dockerfile")
        result = subprocess.run(
            [self.program, *start, "--file", file, *given, *options, str(context)],
            stdin=subprocess.DEVNULL,
            stdout=_STANDARD_ERROR,
            # Docker before version 23 has BuildKit, which exports a stage's files, but uses it only when told.
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
            check=False,
        )
        if result.returncode:
            raise ContainerImageError(
                f"{self.name} could not build the image (exit status {result.returncode}). Its output above says why."
            )

    def labels(self, image: str) -> dict[str, str]:
        """Read an image's labels. :raises ContainerImageError: there is no such image."""
        inspect_command = ["inspect", "--type", "image"] if self.name == "buildah" else ["image", "inspect"]
        result = subprocess.run(
            [self.program, *inspect_command, image],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise ContainerImageError(f"{self.name} has no image {image}. Build it first: mlg image build MODEL")
        try:
            document = json.loads(result.stdout)
            config = document["OCIv1"]["config"] if self.name == "buildah" else document[0]["Config"]
            return {str(name): str(value) for name, value in (config.get("Labels") or {}).items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ContainerImageError(
                f"{self.name} describes the image {image} in a way that mlg cannot read."
            ) from error


def find_engine(wanted: str = "") -> ContainerEngine:
    """Find an engine that works.

    :param wanted: its name or path; empty takes the first of docker, podman and buildah that works.
    :raises ContainerImageError: there is none, or it does not run.
    :raises ConfigError: mlg does not know the engine that is wanted.
    """
    if wanted and Path(wanted).name not in _PROBES:
        raise ConfigError(f"MLG_IMAGE_ENGINE={wanted!r} is none of {', '.join(_PROBES)}.")
    failures = []
    for candidate in [wanted] if wanted else _PROBES:
        program, name = shutil.which(candidate), Path(candidate).name
        if program is None:
            continue
        reason = _probe_failure(program, _PROBES[name])
        if reason is None:
            return ContainerEngine(name=name, program=program)
        failures.append(f"{name} is installed but does not work ({reason}).")
    if failures:
        raise ContainerImageError(f"{' '.join(failures)} Start it, or see that you may use it.")
    if wanted:
        raise ContainerImageError(f"There is no program {wanted}, which MLG_IMAGE_ENGINE names. Install it.")
    raise ContainerImageError("There is no container engine here. Install docker, podman or buildah.")


def _probe_failure(program: str, probe: Sequence[str]) -> str | None:
    try:
        result = subprocess.run(
            [program, *probe],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_PROBE_SECONDS:g} seconds"
    except OSError as error:
        return str(error)
    if result.returncode == 0:
        return None
    lines = result.stderr.strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else f"exit status {result.returncode}"
