"""The rules of the project's structure, checked on the source itself and in fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.timing import DEADLINE_SECONDS

ROOT = Path(__file__).parents[1]
#: Package -> the other packages that it may import. Server and batcher do not know each other.
BELOW = {
    "provider_image": set(),
    "store": {"provider_image"},
    "server": {"provider_image", "store", "trainer"},
    "batcher": {"provider_image", "store"},
    "devnet": {"provider_image"},
    "trainer": {"provider_image", "store"},
    "mlg_client": set(),
    "telegram_bot": {"provider_image", "mlg_client"},
    "cli": {"provider_image", "store", "server", "batcher", "devnet", "mlg_client", "trainer", "telegram_bot"},
}
PACKAGES = tuple(BELOW)
#: Never loaded by importing a module, only inside the function that needs it.
HEAVY = ("tensorflow", "keras", "openvino", "onnx", "onnxruntime", "cv2", "yapapi", "ray", "torch", "sklearn")
#: The command line starts quickly because these come with the command that needs them.
HEAVY_IN_COMMANDS = (
    *HEAVY,
    "flask",
    "granian",
    "apscheduler",
    "httpx",
    "rich",
    "numpy",
    "PIL",
    "sqlite_utils",
    "telegram",
)
#: Folders and modules of a package, lowest level first: each imports only from its own level and those below. `*` is
#: everything that is not named.
LEVELS = {
    "provider_image": ("errors", "*", "compiler __main__"),
    "store": ("errors amounts settings states", "files images rows", "database", "*", "store"),
    "server": (
        "errors settings address record_json csv_cells http_client endpoint status",
        "live auth serializers",
        "webhooks thumbnails similarity",
        "intake",
        "context",
        "api",
        "pages",
        "app",
        "process",
    ),
    "batcher": (
        "backoff errors systemd waiting workspace planner",
        "image_build",
        "executors settings",
        "resizing",
        "packing pipelines progress results result_writer trainings",
        "cycle",
        "scheduler",
    ),
}
#: A module in one of these is a module that nobody finds.
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
#: The most modules of one folder, `__init__` and `__main__` not counted.
MAX_MODULES = 18


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def all_modules() -> list[Path]:
    return [ROOT / "mlg.py", *(path for package in PACKAGES for path in modules(package))]


def name_of(path: Path) -> str:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


def imported_names(tree: ast.AST) -> set[str]:
    """List the dotted names that code imports; `from a import b` is a.b, which may be no module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(ast.parse(path.read_text()))}


def imported_at_start(path: Path) -> set[str]:
    """List what a module imports outside its functions, for the sake of types too."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = []
    return imported_names(tree)


def part_of(package: str, name: str) -> str | None:
    """Return the folder or module of a package that a dotted name lies in; None for others and the package itself."""
    first, *rest = name.split(".")
    if first != package or not rest:
        return None
    folder = ROOT / package
    return rest[0] if (folder / rest[0]).is_dir() or (folder / f"{rest[0]}.py").exists() else None


def upward_imports(package: str) -> set[tuple[str, str, str]]:
    level_of = {name: level for level, names in enumerate(LEVELS[package]) for name in names.split()}
    found = set()
    for path in modules(package):
        importer = part_of(package, name_of(path))
        for imported in {part_of(package, name) for name in imported_at_start(path)} - {None, importer}:
            lowest, highest = (
                level_of.get("*", -1),
                level_of.get("*", len(level_of)),
            )  # of a part that is not in the table
            if importer and imported and level_of.get(importer, lowest) < level_of.get(imported, highest):
                found.add((package, importer, imported))
    return found


def loaded_by(code: str) -> set[str]:
    """Run code in a fresh process and return the top-level names of everything it loaded."""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=True,
    )
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_from_the_packages_below_it(package: str) -> None:
    for path in modules(package):
        above = (imported_packages(path) & {*PACKAGES, "mlg"}) - BELOW[package] - {package}

        assert not above, f"{path} imports {above}"


@pytest.mark.parametrize("package", LEVELS)
def test_inside_a_package_a_folder_imports_only_what_is_below_it(package: str) -> None:
    assert upward_imports(package) == set()


def test_provider_image_loads_only_the_standard_library() -> None:
    names = [name_of(path) for path in modules("provider_image") if path.name != "__main__.py"]

    loaded = loaded_by("\n".join(f"import {name}" for name in names))

    assert loaded - set(sys.stdlib_module_names) - {"provider_image", "__main__"} <= site_modules()


def site_modules() -> set[str]:
    """What the interpreter itself loads at start in this environment (.pth files and the like)."""
    return loaded_by("") - set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    names = [name_of(path) for path in modules(package) if path.name != "__main__.py"]

    loaded = loaded_by("\n".join(f"import {name}" for name in names))

    assert not loaded & set(HEAVY)


def test_the_command_line_starts_without_anything_heavy() -> None:
    loaded = loaded_by(
        "import mlg, cli.serve, cli.submission.submit, cli.requests, cli.models, cli.compile, cli.image, cli.keys,"
        " cli.webhooks, cli.operate, cli.batch, cli.up, cli.collections, cli.rentals.costs, cli.rentals.bills,"
        " cli.rentals.providers, cli.rentals.golem, cli.rentals.devnet, cli.clients.telegram"
    )

    assert not loaded & set(HEAVY_IN_COMMANDS)


def test_async_stays_where_many_waits_happen_at_once() -> None:
    modules = ("executors/", "cycle", "progress", "scheduler", "trainings", "waiting")
    others = ("cli/rentals/devnet", "cli/clients/telegram", "cli/load/", "devnet/", "mlg_client/", "telegram_bot/")
    allowed = (*(f"batcher/{module}" for module in modules), *others)
    for path in all_modules():
        place = str(path.relative_to(ROOT))
        has_async = any(isinstance(node, ast.AsyncFunctionDef) for node in ast.walk(ast.parse(path.read_text())))

        assert not has_async or place.startswith(allowed), place


def test_every_module_has_a_docstring_and_a_name_that_means_something() -> None:
    for path in all_modules():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
        assert path.stem not in VAGUE_NAMES and path.parent.name not in VAGUE_NAMES, path


def test_a_folder_holds_no_more_modules_than_one_sees_at_a_glance() -> None:
    counts: dict[str, int] = defaultdict(int)
    for path in all_modules():
        counts[str(path.parent.relative_to(ROOT))] += path.stem not in ("__init__", "__main__")

    assert {folder for folder, count in counts.items() if count > MAX_MODULES} == set()


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for path in all_modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name_of(path))

    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert shared == {}


def test_every_public_function_has_a_docstring() -> None:
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    for path in all_modules():
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, functions | ast.ClassDef)]
        for node in [node for node in top if not node.name.startswith("_")]:
            # "See `package.Interface`": the methods are documented there.
            implements = (ast.get_docstring(node) or "").startswith("See `")
            inside = node.body if isinstance(node, ast.ClassDef) and not implements else []
            for member in [node, *(item for item in inside if isinstance(item, functions))]:
                if not member.name.startswith("_"):
                    assert ast.get_docstring(member), f"{path}: {member.name} has no docstring"
