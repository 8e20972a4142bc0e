"""The folder copied alone into an empty one runs with numpy, pillow and openvino only."""

import shutil
import subprocess
import sys

from provider_image.chunk import read_results
from tests.provider_image.conftest import ROOT, make_chunk

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


def test_folder_copied_alone_runs(tmp_path, photos, models_folder):
    folder = tmp_path / "provider_image"
    shutil.copytree(ROOT / "provider_image", folder, ignore=shutil.ignore_patterns("__pycache__"))
    chunk = make_chunk(tmp_path / "chunk.zip", [photos["chelsea"], photos["rocket"]])
    arguments = ["run", chunk, tmp_path / "results.zip", "--models", models_folder, "--cold"]

    done = subprocess.run(
        [sys.executable, "-I", "-c", GUARDED, tmp_path, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(folder / "__init__.py")
    items = read_results(tmp_path / "results.zip", "chunk-1", "efficientnet_lite0", [0, 1]).items
    assert [item.output[0][1] for item in items] == ["tiger_cat", "missile"]


def test_without_the_wheel_a_missing_model_is_not_installed(tmp_path, photos):
    chunk = make_chunk(tmp_path / "chunk.zip", [photos["chelsea"]])
    arguments = ["run", chunk, tmp_path / "results.zip", "--models", tmp_path / "models", "--cold"]

    done = subprocess.run(
        [sys.executable, "-I", "-c", GUARDED, ROOT, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 1
    assert "mlg models compile efficientnet_lite0" in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_heavy_is_imported_before_a_model_is_loaded():
    code = (
        "import sys, provider_image.__main__, provider_image.runtime, provider_image.warm_server, "
        "provider_image.warm_client, provider_image.images.decoding, provider_image.compiler.lite0, "
        "provider_image.services.classification\n"
        "print([name for name in ('numpy', 'PIL', 'openvino', 'asyncio', 'urllib.request') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
