"""The package as the provider image has it, alone and without the compiler, needs only numpy, pillow and openvino."""

import ast
import shutil
import subprocess
import sys

import pytest

from provider_image.chunk import read_results
from tests.provider_image.conftest import ROOT, make_chunk
from tests.timing import DEADLINE_SECONDS

# Only these may be imported beside the standard library and the folder itself.
GUARDED = """
import sys
ALLOWED = {"provider_image", "numpy", "PIL", "openvino", *sys.stdlib_module_names}
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"{name} is not there", name=name)
sys.meta_path.insert(0, Guard())
sys.path.insert(0, sys.argv.pop(1))
from provider_image.__main__ import main
import provider_image
print(provider_image.__file__)
sys.exit(main())
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package as the provider image has it."""
    folder = tmp_path / "opt" / "provider_image"
    ignored = shutil.ignore_patterns("__pycache__", "compiler", "Dockerfile", "mlg-provider")
    shutil.copytree(ROOT / "provider_image", folder, ignore=ignored)
    return folder


def provider(root, *arguments):
    """Run the command from a package in a folder, without this project's other packages."""
    return subprocess.run(
        [sys.executable, "-I", "-c", GUARDED, root, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        cwd=root,
    )


def test_package_copied_without_the_compiler_runs_a_chunk(tmp_path, package, photos, models_folder):
    chunk = make_chunk(tmp_path / "chunk.zip", [photos["chelsea"], photos["rocket"]])

    done = provider(package.parent, "run", chunk, tmp_path / "results.zip", "--models", models_folder, "--cold")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(package / "__init__.py")
    items = read_results(tmp_path / "results.zip", "chunk-1", "efficientnet_lite0", [0, 1]).items
    assert [item.output[0][1] for item in items] == ["tiger_cat", "missile"]


def test_package_copied_without_the_compiler_runs_a_chunk_in_a_warm_process(
    tmp_path, package, photos, models_folder, monkeypatch
):
    monkeypatch.setenv("MLG_KEEP_WARM_SECONDS", "0.5")
    chunk = make_chunk(tmp_path / "chunk.zip", [photos["chelsea"]])
    options = ["--models", models_folder, "--place", tmp_path / "places"]

    done = provider(package.parent, "run", chunk, tmp_path / "results.zip", *options)

    assert (done.returncode, done.stderr) == (0, "")
    assert read_results(tmp_path / "results.zip", "chunk-1", "efficientnet_lite0", [0]).items[0].error is None


def test_package_copied_without_the_compiler_checks_a_models_folder_that_cannot_be_written(
    tmp_path, package, models_folder
):
    models = tmp_path / "models"
    artefact = shutil.copytree(models_folder / "efficientnet_lite0", models / "efficientnet_lite0")
    (models / ".speeds").touch()  # so that root cannot write it either
    artefact.chmod(0o555)
    models.chmod(0o555)
    before = {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}

    done = provider(package.parent, "check", "--models", models)

    models.chmod(0o755)
    artefact.chmod(0o755)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].split() == ["verdict", "ok"]
    assert before == {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_without_the_compiler_a_model_that_cannot_be_loaded_names_the_command_that_installs_it(
    tmp_path, package, photos, models_folder, damage
):
    chunk = make_chunk(tmp_path / "chunk.zip", [photos["chelsea"]])
    if damage == "damaged":
        artefact = shutil.copytree(models_folder / "efficientnet_lite0", tmp_path / "models" / "efficientnet_lite0")
        weights = bytearray((artefact / "model.bin").read_bytes())
        weights[len(weights) // 2] ^= 1
        (artefact / "model.bin").write_bytes(weights)

    done = provider(package.parent, "run", chunk, tmp_path / "results.zip", "--models", tmp_path / "models", "--cold")

    assert done.returncode == 1
    assert "mlg models compile efficientnet_lite0" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_the_weights_a_missing_model_is_not_installed(tmp_path, photos):
    chunk = make_chunk(tmp_path / "chunk.zip", [photos["chelsea"]])

    done = provider(ROOT, "run", chunk, tmp_path / "results.zip", "--models", tmp_path / "models", "--cold")

    assert done.returncode == 1
    assert "mlg models compile efficientnet_lite0" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_compiler_is_only_imported_inside_functions():
    paths = [p for p in (ROOT / "provider_image").rglob("*.py") if "compiler" not in p.relative_to(ROOT).parts]

    for path in paths:
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if any(f"{name}.".startswith("provider_image.compiler.") for name in names):
                assert id(node) in inside, f"{path}:{node.lineno}"


def test_nothing_heavy_is_imported_before_a_model_is_loaded():
    code = (
        "import sys, provider_image.__main__, provider_image.runtime, provider_image.warm_server, "
        "provider_image.warm_client, provider_image.images.decoding, provider_image.compiler.lite0, "
        "provider_image.services.classification\n"
        "print([name for name in ('numpy', 'PIL', 'openvino', 'asyncio', 'urllib.request') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
