"""The rules of the house, proven in fresh processes and on the source itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Package -> the other packages that it may import. Server and batcher do not know each other.
BELOW = {
    "provider_image": set(),
    "store": {"provider_image"},
    "server": {"provider_image", "store"},
    "batcher": {"provider_image", "store"},
    "devnet": {"provider_image"},
    "mlg_client": set(),
    "cli": {"provider_image", "store", "server", "batcher", "devnet", "mlg_client"},
}
PACKAGES = tuple(BELOW)
#: Never loaded by importing a module, only inside the function that needs it.
HEAVY = ("tensorflow", "keras", "openvino", "yapapi", "ray", "torch")
#: The command line starts quickly because these come with the command that needs them.
HEAVY_IN_COMMANDS = (*HEAVY, "flask", "granian", "apscheduler", "httpx", "rich", "numpy", "PIL", "sqlite_utils")
DRAWERS = {"utils.py", "common.py", "helpers.py", "misc.py"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add((node.module or "").split(".")[0])
    return found


def loaded_by(code: str) -> set[str]:
    """Run code in a fresh process and return the top-level names of everything it loaded."""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_imports_only_from_the_rooms_below_it(package: str) -> None:
    for path in modules(package):
        above = (imported(path) & {*PACKAGES, "mlg"}) - BELOW[package] - {package}

        assert not above, f"{path} imports {above}"


def test_the_ground_floor_loads_only_the_standard_library() -> None:
    names = [name_of(path) for path in modules("provider_image") if path.name != "__main__.py"]

    loaded = loaded_by("\n".join(f"import {name}" for name in names))

    assert loaded - set(sys.stdlib_module_names) - {"provider_image", "__main__"} <= site_modules()


def site_modules() -> set[str]:
    """What the interpreter itself loads at start in this environment (.pth files and the like)."""
    return loaded_by("") - set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_room_loads_nothing_heavy(package: str) -> None:
    names = [name_of(path) for path in modules(package) if path.name != "__main__.py"]

    loaded = loaded_by("\n".join(f"import {name}" for name in names))

    assert not loaded & set(HEAVY)


def test_the_command_line_starts_without_anything_heavy() -> None:
    loaded = loaded_by(
        "import mlg, cli.serve, cli.submit, cli.requests, cli.models, cli.compile, cli.image, cli.keys, cli.costs,"
        " cli.providers, cli.webhooks, cli.operate, cli.batch, cli.up,"
        " cli.devnet"
    )

    assert not loaded & set(HEAVY_IN_COMMANDS)


def test_async_stays_in_its_places() -> None:
    allowed = ("batcher/executors/", "devnet/", "batcher/cycle", "batcher/scheduler", "cli/devnet", "mlg_client/")
    for path in [path for package in PACKAGES for path in modules(package)]:
        place = str(path.relative_to(ROOT))
        has_async = any(isinstance(node, ast.AsyncFunctionDef) for node in ast.walk(ast.parse(path.read_text())))

        assert not has_async or place.startswith(allowed), place


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_a_drawer_or_grows_without_saying_why(package: str) -> None:
    for path in modules(package):
        text = path.read_text()

        assert path.name not in DRAWERS, path
        assert ast.get_docstring(ast.parse(text)), f"{path} says not what it is"
        if len(text.splitlines()) > 350:
            says_why = re.search(r"\blong(er)?\b.*\bbecause\b", ast.get_docstring(ast.parse(text)) or "", re.I | re.S)
            assert says_why, f"{path} is over 350 lines"


def test_every_public_function_says_what_it_does() -> None:
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    for path in [ROOT / "mlg.py", *(path for package in PACKAGES for path in modules(package))]:
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, functions | ast.ClassDef)]
        for node in [node for node in top if not node.name.startswith("_")]:
            inside = node.body if isinstance(node, ast.ClassDef) else []
            for member in [node, *(item for item in inside if isinstance(item, functions))]:
                if not member.name.startswith("_"):
                    assert ast.get_docstring(member), f"{path}: {member.name} has no docstring"
