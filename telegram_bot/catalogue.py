"""The models that can be chosen in a chat, and the menus of them, as the server lists them.

A button names a model by a digest, because Telegram takes at most 64 bytes with a button, and because the list may
have changed by the time that it is pressed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from mlg_client import Model
from telegram_bot.texts import say

Buttons = list[list[tuple[str, str]]]
#: Models or services on one page of a menu, and most characters of a button.
PAGE_SIZE, _MAX_LABEL = 8, 40


def digest(name: str) -> str:
    """Return the few characters that stand for a model or a service in a button."""
    return hashlib.sha256(name.encode()).hexdigest()[:10]


def image_inputs(model: Model) -> list[str]:
    """Name the images that a model needs: the photo, and for some a second one with a style."""
    return [name for name, kind in _needed(model).items() if kind == "image"]


def _needed(model: Model) -> Mapping[str, str]:
    """Return the kind of each input that a model needs, by name."""
    inputs = model.raw.get("inputs") or {"image": {"kind": model.raw.get("input", "image")}}
    return {name: str(one["kind"]) for name, one in inputs.items() if not one.get("is_optional")}


class ModelMenu:
    """The models that take photos and are installed. Not changed: a new list is a new menu."""

    def __init__(self, models: Iterable[Model] = ()) -> None:
        self._models = [model for model in models if model.is_installed and _takes_photos(model)]

    def __bool__(self) -> bool:
        return bool(self._models)

    def find(self, name: str | None) -> Model | None:
        """Return a model by its name; None if it is not there."""
        return next((model for model in self._models if model.name == name), None)

    def chosen(self, choice: str) -> Model | None:
        """Return the model of a button; None if it is not there any more."""
        return next((model for model in self._models if f"m{digest(model.name)}" == choice), None)

    def buttons(self, prefix: str, language: str, choice: str = "") -> Buttons:
        """Build the buttons of a menu.

        :param prefix: begins the data of every button.
        :param choice: the data, without the prefix, of the button of a menu that was pressed: `s<digest>.<page>` opens
            the models of a service, `p<page>` the services.
        """
        services: dict[str, list[Model]] = {}
        for model in self._models:
            services.setdefault(model.service, []).append(model)
        opened = next((name for name in services if choice.startswith(f"s{digest(name)}.")), None)
        if opened is None and len(services) == 1:
            opened = next(iter(services))
        page = int(number) if (number := choice.rpartition("." if opened else "p")[2]).isdigit() else 0
        if opened is not None:
            entries = [(model.title or model.name, f"m{digest(model.name)}") for model in services[opened]]
            rows = _page(entries, page, prefix, f"s{digest(opened)}.")
            return rows if len(services) == 1 else [*rows, [(say(language, "button_back"), f"{prefix}p0")]]
        entries = [
            (f"{service_title(name)}: {models[0].title or models[0].name}", f"m{digest(models[0].name)}")
            if len(models) == 1
            else (f"{service_title(name)} ({len(models)})", f"s{digest(name)}.0")
            for name, models in services.items()
        ]
        return _page(entries, page, prefix, "p")

    def has_services(self) -> bool:
        """Tell whether there is more than one kind of work to choose from."""
        return len({model.service for model in self._models}) > 1


def service_title(name: str) -> str:
    """Return the name of a service for people."""
    return name.replace("_", " ").capitalize()


def _takes_photos(model: Model) -> bool:
    if model.raw.get("takes_faces"):
        return False  # biometric data, for which nobody in a chat is asked
    kinds = list(_needed(model).values())
    return kinds in (["image"], ["image", "image"])


def _page(entries: Sequence[tuple[str, str]], page: int, prefix: str, turn: str) -> Buttons:
    pages = -(-len(entries) // PAGE_SIZE)
    page = min(page, pages - 1)
    rows = [
        [(label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL - 1]}…", f"{prefix}{data}")]
        for label, data in entries[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
    ]
    turns = [(arrow, number) for arrow, number in (("◀", page - 1), ("▶", page + 1)) if 0 <= number < pages]
    return [*rows, [(arrow, f"{prefix}{turn}{number}") for arrow, number in turns]] if turns else rows
