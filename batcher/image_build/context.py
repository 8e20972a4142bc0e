"""The build context of the provider's image: all that its Dockerfile takes, and nothing else.

Made by `images.py` in a temporary folder, so that edits and installations meanwhile do not matter. Must not change
what it copies: large files are hard links.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from batcher.errors import ContainerImageError
from provider_image.errors import BrokenArtefact
from provider_image.models.artefact import GRAPH_FILES, Artefact, check_files, read_artefact

#: What the Dockerfile copies from a source checkout. `weights` and `models` come from elsewhere and may be missing.
SOURCES = (
    "constraints.txt",
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "mlg.py",
    "mlg_client",
    "scripts/prune_runtime",
    "provider_image",
    "store",
    "server",
    "batcher",
    "cli",
)
_CHECKOUT = Path(__file__).resolve().parents[2]


def check_checkout() -> None:
    """See that mlg runs from a source checkout. :raises ContainerImageError: it does not; says what to do."""
    missing = [source for source in (*SOURCES, "provider_image/Dockerfile") if not (_CHECKOUT / source).exists()]
    if missing:
        raise ContainerImageError(
            f"Images are built from a source checkout of mlg, and {_CHECKOUT} is none ({missing[0]} is missing). "
            "Clone the repository, then scripts/setup and .venv/bin/mlg image build there."
        )


def find_intact_artefact(models: Path, name: str) -> Artefact:
    """Read an installed artefact whose files are as they were made.

    :param name: canonical.
    :raises NotInstalled: it is not there; names the command that installs it.
    :raises BrokenArtefact: it is damaged, or another model's.
    """
    artefact = read_artefact(models / name)
    if artefact.name != name:
        raise BrokenArtefact(f"{models / name} holds the model {artefact.name[:64]!r}. Rename it to that.")
    check_files(artefact)
    absent = [sample.file for sample in artefact.samples if not (artefact.folder / sample.file).is_file()]
    if absent:
        raise BrokenArtefact(f"{artefact.folder / absent[0]} is missing. What to do says: mlg models check {name}")
    return artefact


def make_context(context: Path, *, weights: Path | None, artefacts: Iterable[Artefact]) -> None:
    """Make the folder.

    :param context: does not exist yet.
    :param weights: folder of weights files, all of which are taken.
    :param artefacts: what is not to be compiled in the build.
    :raises ContainerImageError: something cannot be copied.
    """
    try:
        for source in SOURCES:
            target = context / source
            target.parent.mkdir(parents=True, exist_ok=True)
            if (_CHECKOUT / source).is_dir():
                shutil.copytree(_CHECKOUT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(_CHECKOUT / source, target)
        for file in sorted(weights.iterdir()) if weights is not None else ():
            if file.is_file():
                (context / "weights").mkdir(exist_ok=True)
                _link_or_copy(file, context / "weights" / file.name)
        for artefact in artefacts:
            target = context / "models" / artefact.name
            target.mkdir(parents=True)
            for name in ("model.json", *GRAPH_FILES, *(sample.file for sample in artefact.samples)):
                _link_or_copy(artefact.folder / name, target / name)
    except OSError as error:
        raise ContainerImageError(f"The build context cannot be made: {error}") from error


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file.resolve())  # weights are large
    except OSError:
        shutil.copy2(file, target)
