"""The container engine of this machine: docker, podman or buildah, the first that works.

Used by `builder.py`. The engine's output goes to standard error, so that standard output has only that of mlg.
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

#: Engine -> arguments that succeed only if it works; in order of preference.
_PROBES: Mapping[str, Sequence[str]] = {
    "docker": ("version", "--format", "{{.Server.Version}}"),
    "podman": ("info",),
    "buildah": ("info",),
}
#: Timeout of a probe.
_PROBE_SECONDS = 30.0
_STANDARD_ERROR = 2


@dataclass(frozen=True, kw_only=True)
class ContainerEngine:
    """A working engine."""

    #: docker, podman or buildah.
    name: str
    #: Path of the program.
    program: str

    def build(self, context: Path, arguments: Mapping[str, str], *options: str) -> None:
        """Build the Dockerfile `provider_image/Dockerfile` of a context.

        :param arguments: build arguments of the Dockerfile.
        :param options: further options, the same for all engines.
        :raises ContainerImageError: the engine failed; its output on standard error says why.
        """
        # Without --layers buildah would compile the models again in every build.
        start = ["bud", "--layers"] if self.name == "buildah" else ["build"]
        given = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
        file = str(context / "provider_image" / "Dockerfile")
        result = subprocess.run(
            [self.program, *start, "--file", file, *given, *options, str(context)],
            stdin=subprocess.DEVNULL,
            stdout=_STANDARD_ERROR,
            # Docker before version 23 uses BuildKit, which can export a stage's files, only if this is set.
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
            check=False,
        )
        if result.returncode:
            raise ContainerImageError(
                f"{self.name} could not build the image (exit status {result.returncode}). See its output above."
            )

    def inspect(self, image: str) -> tuple[dict[str, str], str]:
        """Read an image's labels and its architecture, for example amd64.

        :raises ContainerImageError: there is no such image.
        """
        inspect_command = ["inspect", "--type", "image"] if self.name == "buildah" else ["image", "inspect"]
        result = _run(self.program, *inspect_command, image)
        if result.returncode:
            raise ContainerImageError(f"{self.name} has no image {image}. Build it first: mlg image build MODEL")
        try:
            document = json.loads(result.stdout)
            found = document["OCIv1"] if self.name == "buildah" else document[0]
            config = found["config" if self.name == "buildah" else "Config"]
            labels = {str(name): str(value) for name, value in (config.get("Labels") or {}).items()}
            return labels, str(found["architecture" if self.name == "buildah" else "Architecture"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ContainerImageError(
                f"mlg cannot read how {self.name} describes the image {image}. "
                "Try another engine with MLG_IMAGE_ENGINE."
            ) from error


def find_engine(wanted: str = "") -> ContainerEngine:
    """Find an engine that works.

    :param wanted: its name or path; empty takes the first of docker, podman and buildah that works.
    :raises ContainerImageError: there is none, or it does not work.
    :raises ConfigError: mlg does not support the wanted engine.
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
        raise ContainerImageError(f"{' '.join(failures)} Start it, and check that this user may use it.")
    if wanted:
        raise ContainerImageError(f"There is no program {wanted}, which MLG_IMAGE_ENGINE names. Install it.")
    raise ContainerImageError("No container engine is installed. Install docker, podman or buildah.")


def _run(*command: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )


def _probe_failure(program: str, probe: Sequence[str]) -> str | None:
    try:
        result = _run(program, *probe, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no response within {_PROBE_SECONDS:g} seconds"
    except OSError as error:
        return str(error)
    if result.returncode == 0:
        return None
    lines = result.stderr.strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else f"exit status {result.returncode}"
