"""The build context of the provider image: all that its Dockerfile copies, and nothing else.

Made by `builder.py` in a temporary folder, so that edits and installations during the build have no effect. Must not
change the files in it: large ones are hard links.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from batcher.errors import ContainerImageError
from provider_image.errors import BrokenArtefact
from provider_image.models.artefact import Artefact, check_files, read_artefact

#: What the Dockerfile copies from a source checkout. `weights` and `models` come from elsewhere and are optional.
SOURCES = (
    "constraints.txt",
    "setup.cfg",
    "setup.py",
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
    """Check that mlg runs from a source checkout. :raises ContainerImageError: it does not; says what to do."""
    missing = [source for source in (*SOURCES, "provider_image/Dockerfile") if not (_CHECKOUT / source).exists()]
    if missing:
        raise ContainerImageError(
            f"Images are built from a source checkout of mlg. {_CHECKOUT} is not one: {missing[0]} is missing. "
            "Clone the repository, and run scripts/setup and .venv/bin/mlg image build there."
        )


def find_intact_artefact(models: Path, name: str) -> Artefact:
    """Read an installed artefact and check its files.

    :param name: canonical.
    :raises NotInstalled: it is not installed; names the command that installs it.
    :raises BrokenArtefact: it is damaged, or belongs to another model.
    """
    artefact = read_artefact(models / name)
    if artefact.name != name:
        raise BrokenArtefact(f"{models / name} contains the model {artefact.name[:64]!r}. Rename the folder to that.")
    check_files(artefact)
    absent = [name for name in artefact.file_names if not (artefact.folder / name).is_file()]
    if absent:
        raise BrokenArtefact(f"{artefact.folder / absent[0]} is missing. For the remedy run: mlg models check {name}")
    return artefact


def make_context(context: Path, *, weights: Path | None, artefacts: Iterable[Artefact]) -> None:
    """Create the build context.

    :param context: the folder; does not exist yet.
    :param weights: folder of weights files; all are included.
    :param artefacts: models that are copied, not compiled in the build.
    :raises ContainerImageError: a file cannot be copied.
    """
    try:
        for source in SOURCES:
            target = context / source
            target.parent.mkdir(parents=True, exist_ok=True)
            if (_CHECKOUT / source).is_dir():
                shutil.copytree(_CHECKOUT / source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            else:
                shutil.copy2(_CHECKOUT / source, target)
        for file in sorted(weights.iterdir()) if weights is not None else ():
            if file.is_file():
                (context / "weights").mkdir(exist_ok=True)
                _link_or_copy(file, context / "weights" / file.name)
        for artefact in artefacts:
            target = context / "models" / artefact.name
            target.mkdir(parents=True)
            for name in ("model.json", *artefact.file_names):
                _link_or_copy(artefact.folder / name, target / name)
    except OSError as error:
        raise ContainerImageError(f"The build context cannot be created: {error}") from error


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file.resolve())  # weights are large
    except OSError:
        shutil.copy2(file, target)
