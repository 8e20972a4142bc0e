"""The folders of the server import only what is below them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[2] / "server"


def imported_modules(folder: str) -> dict[str, set[str]]:
    """Return the modules that each file of a folder imports, also inside its functions."""
    found = {}
    for path in sorted((SERVER / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        found[str(path)] = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} | {
            node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)
        }
    return found


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("api", ("server.pages", "server.app")),
        ("status", ("server.pages", "server.api", "cli", "click", "flask", "werkzeug")),
    ],
)
def test_a_folder_of_the_server_does_not_import_what_is_above_it(folder: str, forbidden: tuple[str, ...]) -> None:
    for path, modules in imported_modules(folder).items():
        above = {module for module in modules if any(f"{module}.".startswith(f"{name}.") for name in forbidden)}

        assert not above, f"{path} imports {above}"
