"""Other names for the classes of an installed model, for example in another language.

Called by `mlg models labels` and `mlg models compile`. The graph and the ids of the classes stay. With other names it
is another artefact, because its answers are others.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from provider_image.compiler.custom import CustomModel, Labels, check_description
from provider_image.compiler.installing import build_folder, install
from provider_image.compiler.labels import read_labels
from provider_image.errors import UnsuitableModel
from provider_image.models.artefact import FORMAT_VERSION, Artefact, check_files, read_artefact


def replace_names(
    models: Path, name: str, file: Path, *, copy_as: str | None = None, title: str | None = None
) -> Artefact:
    """Give the classes of an installed model other names; nothing is compiled.

    :param file: a labels file: one name a line in the model's order, or an id, a tab and a name for each, in any order.
    :param copy_as: the name of a custom model that is installed beside it instead of replacing it.
    :param title: the copy's name for people; None takes its name.
    :raises UnsuitableModel: the file does not name each class once.
    :raises NotInstalled: there is no such model, or the models folder cannot be written.
    :raises BrokenArtefact: the model is damaged.
    :raises ConfigError: the copy cannot have this name or title.
    """
    given = read_labels(file)
    if copy_as is not None:
        check_description(models, CustomModel(name=copy_as, file=file, labels=file, title=title))
    with build_folder(models, copy_as or name) as folder:
        source = read_artefact(models / name)
        if source.service != "classification":
            raise UnsuitableModel(f"The model {name} has no classes: its service is {source.service}.")
        for each in source.file_names:
            _link_or_copy(source.folder / each, folder / each)
        check_files(replace(source, folder=folder))
        labels = _renamed(source.labels, given, file)
        names = dict(labels)
        samples = tuple(
            replace(sample, output=[[id, names[id], *rest] for id, _, *rest in sample.output])
            for sample in source.samples
        )
        new = replace(source, format=FORMAT_VERSION, labels=labels, samples=samples)
        if copy_as is not None:
            new = replace(new, name=copy_as, title=title or copy_as, source="own")
        return install(new, folder, models, tuple(source.files))


def _renamed(labels: Labels, given: Labels, file: Path) -> Labels:
    """Return the labels with the given names. :raises UnsuitableModel: those do not fit."""
    ids = [id for id, _ in labels]
    names: Mapping[str, str] = dict(given)
    if names.keys() == set(ids):
        return tuple((id, names[id]) for id in ids)
    if any(id != name for id, name in given):  # with ids
        absent = [id for id in ids if id not in names]
        what = (
            f"does not name the class {absent[0]!r}"
            if absent
            else f"names the class {next(id for id in names if id not in ids)!r}, which the model does not have"
        )
        raise UnsuitableModel(f"{file} {what}. `mlg models labels MODEL` lists the classes.")
    if len(given) != len(ids):
        raise UnsuitableModel(
            f"The model has {len(ids)} classes and {file} {len(given)} names. Write one line per class, in order."
        )
    return tuple((id, name) for id, (name, _) in zip(ids, given, strict=True))


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, target)
