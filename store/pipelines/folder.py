"""The files of pipelines: `NAME.toml` in the folder `pipelines` of a home, and those that are part of mlg.

Read by the server when a request is sent, and by the commands. A file of the home takes the place of a built-in one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from provider_image.errors import MlgError, UnknownModel
from provider_image.models.catalogue import normalise_name
from provider_image.models.registry import find_row
from store.pipelines.definition import MAX_FILE_BYTES, InvalidPipeline, Pipeline, parse_pipeline

_BUILT_IN = Path(__file__).parent / "builtin"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
#: Most files that are listed.
MAX_PIPELINES = 1000


@dataclass(frozen=True, kw_only=True)
class PipelineFile:
    """A file, checked."""

    name: str
    path: Path
    #: None if it cannot be used.
    pipeline: Pipeline | None
    #: Why it cannot be used.
    reason: str | None = None

    @property
    def is_built_in(self) -> bool:
        """Tell whether it is part of mlg."""
        return self.path.parent == _BUILT_IN


class PipelineFolder:
    """The pipelines of a home. :param home: its folder. :param models: the folder of models."""

    def __init__(self, home: Path, models: Path) -> None:
        self._folders = (home / "pipelines", _BUILT_IN)
        self._models = models

    def find(self, spelling: str) -> Pipeline | None:
        """Return the pipeline with a name, in any spelling; None if there is none. :raises InvalidPipeline:"""
        key = normalise_name(spelling[:64])
        path = next((path for path in self._paths() if normalise_name(path.stem) == key), None)
        return None if path is None else self.read(path)

    def has(self, spelling: str) -> bool:
        """Tell whether there is a file with a name, in any spelling, whether it can be used or not."""
        return normalise_name(spelling[:64]) in map(normalise_name, (path.stem for path in self._paths()))

    def list_files(self) -> list[PipelineFile]:
        """Check all files, by name."""
        found = []
        for path in self._paths():
            try:
                found.append(PipelineFile(name=path.stem, path=path, pipeline=self.read(path)))
            except MlgError as error:
                found.append(PipelineFile(name=path.stem, path=path, pipeline=None, reason=error.reason))
        return found

    def read(self, path: Path) -> Pipeline:
        """Read and check a file. :raises InvalidPipeline:"""
        try:
            with path.open("rb") as file:
                text = file.read(MAX_FILE_BYTES + 1).decode()
        except (OSError, UnicodeDecodeError) as error:
            # Clients see it, so it has no path.
            raise InvalidPipeline(f"{path.name} cannot be read as UTF-8.") from error
        if not _NAME.fullmatch(path.stem):
            raise InvalidPipeline(
                f"{path.name}: the name has up to 64 lower-case letters, digits and underscores, a letter first."
            )
        if self._is_model(path.stem):
            raise InvalidPipeline(f"{path.name}: there is a model with this name. Give the file another one.")
        try:
            return parse_pipeline(path.stem, text, self._models)
        except InvalidPipeline as error:
            raise InvalidPipeline(f"{path.name}: {error.reason}") from error

    def _is_model(self, name: str) -> bool:
        try:
            find_row(self._models, name)
        except UnknownModel:
            return False
        except MlgError:
            return True  # a damaged one
        return True

    def _paths(self) -> list[Path]:
        """List the files by name; of two with the same name, that of the home."""
        found: dict[str, Path] = {}
        for folder in self._folders:
            for path in sorted(folder.glob("*.toml"))[:MAX_PIPELINES]:
                found.setdefault(normalise_name(path.stem), path)
        return sorted(found.values(), key=lambda path: path.stem)
