"""Writes those parts of the documentation that can be read from the code.

Called by `scripts/generate_docs` and by `tests/test_docs.py`, which fails when a file is out of date. A generated part
stands between two comments, `<!-- generated: NAME -->` and `<!-- end -->`; everything outside of them is written by
hand and is left alone.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from batcher.executors import REGISTRY

ROOT = Path(__file__).parents[1]
#: What belongs to the program; a package that does not exist is skipped.
PACKAGES = ("cli", "server", "batcher", "store", "provider_image", "devnet", "mlg_client", "trainer", "telegram_bot")
#: Settings record -> heading of its table, in the order of the file. Those of executors follow, found through their
#: registry. All other records share the last one.
HEADINGS = {
    "HomeSettings": "Home",
    "ServerSettings": "Server",
    "BatcherSettings": "Batcher",
    "FallbackSettings": "Batcher",
    "TelegramSettings": "Telegram bot",
}
OTHER_HEADING = "Provider image and weights"
#: Tag of the API description -> heading of its table, in the order of the file.
TAGS = {
    "predictions": "Single images",
    "batches": "Groups of images",
    "requests": "Requests",
    "collections": "Collections",
    "usage": "Usage",
    "events": "Live events",
    "webhooks": "Webhook messages",
    "models": "Models",
    "server": "Server",
    "operator": "Operator",
}
_METHODS = ("get", "post", "put", "patch", "delete")
_SETTING = re.compile(r"^(?P<text>.*?)\s*(?P<name>MLG_[A-Z_]+)\. Defaults to (?P<default>.*)\.$")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One environment variable, as the comment over its field describes it."""

    name: str
    default: str
    text: str


def settings() -> dict[str, list[Setting]]:
    """Find every setting: name of its record -> its settings, in the order of the fields."""
    found: dict[str, list[Setting]] = {}
    for path in _sources():
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.ClassDef):
                read = [_setting(lines, field.lineno) for field in node.body if isinstance(field, ast.AnnAssign)]
                if kept := [setting for setting in read if setting is not None]:
                    found[node.name] = kept
    order = headings()
    return dict(sorted(found.items(), key=lambda item: (_place_of(item[0], order), item[0])))


def headings() -> dict[str, str]:
    """Return settings record -> heading of its table, executors included."""
    found = dict(HEADINGS)
    for name, factory in sorted(REGISTRY.items(), reverse=True):
        place = ROOT.joinpath(*factory.partition(":")[0].split(".")[:3])  # batcher/executors/NAME, a folder or a file
        for path in place.glob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name.endswith("Settings"):
                    found[node.name] = name.capitalize()
    return found


def settings_part() -> str:
    """Write a table for each settings record."""
    tables: dict[str, list[tuple[str, ...]]] = {}
    titles = headings()
    for record, rows in settings().items():
        cells = [(f"`{row.name}`", _default(row.default), row.text) for row in rows]
        tables.setdefault(titles.get(record, OTHER_HEADING), []).extend(cells)
    head = ("variable", "default", "meaning")
    return "\n\n".join(f"### {heading}\n\n{_table(head, cells)}" for heading, cells in tables.items())


def commands() -> Iterator[tuple[str, click.Command]]:
    """Walk over all commands of `mlg`, groups included, hidden ones left out."""
    from mlg import cli

    yield from _walk("mlg", cli)


def commands_part() -> str:
    """Write a section for each command: what it does, an example, its options."""
    parts = []
    for path, command in commands():
        if path == "mlg":
            continue
        level = "##" + "#" * (path.count(" ") - 1)
        text, example = _help_of(command)
        parts.append(f"{level} {path}\n\n{text}")
        if example:
            parts.append(f"```sh\n{example}\n```")
        if rows := list(_parameters(command)):
            parts.append(_table(("argument or option", "meaning"), rows))
    return "\n\n".join(parts)


@functools.cache
def document() -> Mapping[str, Any]:
    """Build the API's description, as GET /openapi.json answers it.

    In a process of its own, because it lists the errors of all modules that happen to be imported.
    """
    code = "import json; from scripts.generate_docs import build; print(json.dumps(build()))"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    described: Mapping[str, Any] = json.loads(made.stdout)
    return described


def build() -> Mapping[str, Any]:
    """Build the API's description in this process."""
    from server.api.openapi import build_document
    from server.app import create_app
    from server.settings import ServerSettings
    from store.store import Store

    # The description is made from the views alone, so the store of this home is never opened.
    settings = ServerSettings(home=Path("/nonexistent"))
    return build_document(create_app(settings, Store(settings)))


def endpoints_part() -> str:
    """Write a table of endpoints for each tag of the API's description."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for name, said in _operations():
        scopes = [scope for one in said["security"] for scope in one.get("bearer", [])]
        query = [f"`{one['name']}`" for one in said["parameters"] if one["in"] == "query"]
        rows.setdefault(said["tags"][0], []).append((name, said["summary"], ", ".join(query), ", ".join(scopes)))
    head = ("endpoint", "what it does", "query", "scope")
    parts = [
        f"### {TAGS.get(tag, tag.capitalize())}\n\n{_table(head, rows[tag])}"
        for tag in sorted(rows, key=lambda tag: (_place_of(tag, TAGS), tag))
    ]
    return "\n\n".join(parts)


def errors_part() -> str:
    """Write a table of the error codes of each HTTP status."""
    codes: dict[str, set[str]] = {}
    for _, said in _operations():
        for status, answer in said["responses"].items():
            # 500 stands for every error that the server did not expect, so its codes say nothing.
            if 400 <= int(status) != 500:
                codes.setdefault(status, set()).update(re.findall(r"`(\w+)`", answer["description"]))
    rows = [(status, ", ".join(f"`{code}`" for code in sorted(codes[status]))) for status in sorted(codes)]
    return _table(("status", "codes"), rows)


def _operations() -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path, methods in document()["paths"].items():
        for method in _METHODS:
            if method in methods:
                yield f"`{method.upper()} {path}`", methods[method]


#: Name of a generated part -> its file and what writes it.
PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "settings": ("docs/settings.md", settings_part),
    "commands": ("docs/commands.md", commands_part),
    "endpoints": ("docs/http-api.md", endpoints_part),
    "errors": ("docs/http-api.md", errors_part),
}


def stale() -> dict[Path, str]:
    """Return the files that are out of date, with the whole text that they should have.

    :raises ValueError: a file lacks the comments of a part that belongs into it.
    """
    texts: dict[Path, str] = {}
    for name, (file, write) in PARTS.items():
        path = ROOT / file
        text = texts.get(path) or path.read_text()
        start, end = f"<!-- generated: {name} -->", "<!-- end -->"
        before, found, rest = text.partition(start)
        _, has_end, after = rest.partition(end)
        if not found or not has_end:
            raise ValueError(f"{file} has no generated part {name!r}: put {start} and {end} where it belongs.")
        texts[path] = f"{before}{start}\n\n{write()}\n\n{end}{after}"
    return {path: text for path, text in texts.items() if path.read_text() != text}


def main() -> None:
    """Write what is out of date."""
    for path, text in stale().items():
        print(f"{path.relative_to(ROOT)} written")
        path.write_text(text)


def _sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def _setting(lines: list[str], number: int) -> Setting | None:
    """Read the `#:` comment over the field in a line. :param number: counts from 1. :return: None: not a setting."""
    comment: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#: "):
            break
        comment.insert(0, line.strip().removeprefix("#: "))
    match = _SETTING.match(" ".join(comment))
    return match and Setting(name=match["name"], default=match["default"], text=match["text"].rstrip("."))


def _default(default: str) -> str:
    """Set a default as code, what explains it as text: `604800` (7 days). The unit is in the variable's name."""
    value, _, more = re.sub(r" seconds?$", "", default).partition(" ")
    if value == "empty" or (more and not more.startswith("(")):
        return default
    return " ".join([f"`{value}`", more]).strip()


def _place_of(name: str, order: Mapping[str, str]) -> int:
    return list(order).index(name) if name in order else len(order)


def _walk(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                yield from _walk(f"{path} {name}", child)


def _help_of(command: click.Command) -> tuple[str, str]:
    """Split a command's help into its text, a paragraph a line, and its example."""
    text, _, example = inspect.cleandoc(command.help or "").replace("\b\n", "").partition("Example:\n")
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    return "\n\n".join(paragraphs), inspect.cleandoc(example).strip()


def _parameters(command: click.Command) -> Iterator[tuple[str, str]]:
    for one in command.params:
        if isinstance(one, click.Option) and not one.hidden:
            value = "" if one.is_flag else f" {_value_of(one)}"
            text = one.help or ""
            notes = [
                text if text.endswith("]") else f"{text.rstrip('.')}.",
                "Required." if one.required else "",
                f"[{one.default}]" if one.show_default and isinstance(one.default, str | int | float) else "",
            ]
            yield f"`{', '.join(one.opts)}{value}`", " ".join(note for note in notes if note)
        elif isinstance(one, click.Argument):
            name = one.metavar or (one.name or "").upper()
            many = "..." if one.nargs == -1 and not name.endswith("...") else ""
            yield f"`{name}{many}`", "Required." if one.required else "May be left out."


def _value_of(option: click.Option) -> str:
    if option.metavar:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return "|".join(str(choice) for choice in option.type.choices)
    return {"integer": "N", "integer range": "N", "float": "N", "float range": "N"}.get(option.type.name, "TEXT")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
