"""`mlg image` with a fake engine and a fake gvmkit-build: programs on PATH that record their arguments."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from batcher.errors import ContainerImageError
from batcher.image_build.builder import ImageSettings, image_tag, push_image
from batcher.image_build.lock import PublishedImage, add_to_lock, lock_file, read_lock
from provider_image.backends.openvino import GRAPH_FILES
from provider_image.errors import ConfigError
from provider_image.models.artefact import find_artefact, read_artefact
from tests.onnx_models import install_unusual
from tests.timing import DEADLINE_SECONDS

ROOT = Path(__file__).parents[2]
MODEL = "efficientnet_lite0"
#: "Builds" by copying artefacts, from the context or from a folder of artefacts, and stores an image as its labels.
ENGINE = """
import json, os, shutil, sys
from pathlib import Path

home = Path(os.environ["FAKE_HOME"])
name, words = Path(sys.argv[0]).name, sys.argv[1:]
with (home / "calls").open("a") as calls:
    calls.write(json.dumps([name, *words]) + "\\n")
if words[0] in ("version", "info"):
    if os.environ.get("FAKE_ENGINE_DOWN"):
        print("hint", file=sys.stderr)
        sys.exit("Cannot connect to the service.")
elif words[0] in ("build", "bud"):
    context = Path(words[-1])
    given = dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "--build-arg")
    print("STEP of the engine")
    if given.get("BASE") == "nowhere":
        sys.exit("no such base")
    seen = {str(path.relative_to(context)): path.stat().st_size for path in context.rglob("*") if path.is_file()}
    (home / "context.json").write_text(json.dumps(seen))
    if "--output" in words:
        folder = Path(words[words.index("--output") + 1].removeprefix("type=local,dest="))
        for model in given["MODEL"].split(","):
            taken = context / "models" / model
            if not os.environ.get("FAKE_NOTHING_BUILT"):
                shutil.copytree(taken if taken.exists() else Path(os.environ["FAKE_MODELS"]) / model, folder / model)
    if "--tag" in words:
        labels = {"mlg.model": given["MODEL"], "mlg.digest": given.get("DIGEST", "")}
        file = home / "images" / words[words.index("--tag") + 1].replace("/", "_")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(labels))
elif "inspect" in words:
    file = home / "images" / words[-1].replace("/", "_")
    if not file.exists():
        sys.exit("no such image")
    labels = json.loads(file.read_text())
    config, machine = {"Labels": labels}, os.environ.get("FAKE_ARCHITECTURE", "amd64")
    oci = {"OCIv1": {"config": config, "architecture": machine}}
    print(json.dumps(oci if name == "buildah" else [{"Config": config, "Architecture": machine}]))
"""
#: Prints what gvmkit-build 0.3.19 prints.
GVMKIT = """
import hashlib, os, sys
from pathlib import Path

words = sys.argv[1:]
print("Golem Image Builder v0.3.19")
problem = os.environ.get("FAKE_GVMKIT")
if problem == "login":
    print("Logging in to golem registry: https://registry.example")
    sys.exit("Error: Platform secure storage failure: no secret service provider or dbus session found")
if problem == "engine":
    sys.exit("Error: Cannot connect to docker engine, please check if docker is running")
if problem == "upload":
    sys.exit("Error: Image upload failed with code 500")
file = Path(words[words.index("--output") + 1])
if problem != "no_file":
    file.write_bytes(b"squashed " + words[0].encode())
    hash = "0" * 56 if problem == "other_hash" else hashlib.sha3_224(file.read_bytes()).hexdigest()
    print(f" -- image link (for use in SDK): {hash}")
"""


@dataclass
class Machine:
    """A machine that has only the programs that a test adds."""

    folder: Path
    models: Path

    def add(self, name: str, source: str) -> None:
        program = self.folder / "bin" / name
        program.write_text(f"#!{sys.executable} -S\n{source}")
        program.chmod(0o755)

    def variables(self, changes: Mapping[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLG_", "FAKE_"))}
        own = {
            "PATH": str(self.folder / "bin"),
            "MLG_HOME": str(self.folder / "home"),
            "FAKE_HOME": str(self.folder),
            "FAKE_MODELS": str(self.models),
        }
        return {**kept, **own, **changes}

    def mlg(self, *words: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "mlg.py"), "image", *map(str, words)],
            env=self.variables(changes),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def context(self) -> dict[str, int]:
        found: dict[str, int] = json.loads((self.folder / "context.json").read_text())
        return found

    def install(self, folder: Path) -> Path:
        """Install an artefact in this machine's home as a copy that may be changed."""
        target = self.folder / "home" / "models" / folder.name
        shutil.copytree(folder, target)
        return target

    def activate(self, patch: pytest.MonkeyPatch, **changes: str) -> None:
        """Make code in this process use this machine."""
        for name, value in self.variables(changes).items():
            patch.setenv(name, value)


@pytest.fixture
def machine(tmp_path: Path, models_folder: Path) -> Machine:
    (tmp_path / "bin").mkdir()
    return Machine(tmp_path, models_folder)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.strip().splitlines()[-1]


# build


def test_build_labels_the_image_with_the_digest_of_what_was_compiled(machine: Machine) -> None:
    machine.add("docker", ENGINE)
    digest = find_artefact(machine.models, MODEL).digest

    result = machine.mlg("build", "EfficientNet-Lite0")

    assert result.returncode == 0, result.stderr
    assert result.stdout == f"mlg-provider:{MODEL} holds {MODEL} (digest {digest[:12]})\n"
    assert "STEP of the engine" in result.stderr
    first, second = [call for call in machine.calls() if call[1] == "build"]
    assert first[first.index("--target") + 1] == "artefacts" and "--tag" not in first
    assert f"DIGEST={digest}" in second and f"MODEL={MODEL}" in second


def test_the_context_holds_what_the_dockerfile_copies_and_the_weights_and_nothing_else(machine: Machine) -> None:
    machine.add("docker", ENGINE)
    (machine.folder / "weights").mkdir()
    (machine.folder / "weights" / "some.weights.h5").write_bytes(b"12345")

    result = machine.mlg("build", MODEL, "--weights", machine.folder / "weights", "--base", "other:1")

    assert result.returncode == 0, result.stderr
    context = machine.context()
    assert context["weights/some.weights.h5"] == 5
    assert {"constraints.txt", "scripts/prune_runtime", "provider_image/Dockerfile", "mlg.py"} <= context.keys()
    tops = {name.split("/")[0] for name in context}
    assert not tops & {".git", ".venv", "tests", "docs"} and not any("__pycache__" in name for name in context)
    assert all("BASE=other:1" in call for call in machine.calls() if call[1] == "build")


def test_onnxruntime_is_in_the_image_only_if_a_model_needs_it(machine: Machine, tmp_path: Path) -> None:
    machine.add("docker", ENGINE)
    unusual = install_unusual(tmp_path / "unusual")
    machine.install(unusual.folder)

    without = machine.mlg("build", MODEL)
    with_it = machine.mlg("build", MODEL, "unusual")

    assert (without.returncode, with_it.returncode) == (0, 0), without.stderr + with_it.stderr
    builds = [call for call in machine.calls() if call[1] == "build"]
    assert ["BACKENDS=onnxruntime" in call for call in builds] == [False, False, True, True]
    assert machine.context()["models/unusual/model.onnx"] == unusual.size_bytes


def test_opencv_is_in_the_image_only_if_a_model_needs_it_which_is_built_first(machine: Machine) -> None:
    machine.add("docker", ENGINE)

    result = machine.mlg("build", MODEL, "quality")

    assert result.returncode == 0, result.stderr
    builds = [call for call in machine.calls() if call[1] == "build"]
    assert ["BACKENDS=opencv-python-headless" in call for call in builds] == [True, True]
    assert machine.context()["models/quality/method.json"] > 0


@pytest.mark.parametrize(("engine", "command"), [("podman", ["build"]), ("buildah", ["bud", "--layers"])])
def test_podman_and_buildah_build_too(machine: Machine, engine: str, command: list[str]) -> None:
    machine.add(engine, ENGINE)

    result = machine.mlg("build", MODEL, "--tag", "mine:1")

    assert result.returncode == 0, result.stderr
    assert machine.calls()[-1][: 1 + len(command)] == [engine, *command]
    assert result.stdout.startswith("mine:1 holds ")


def test_an_engine_that_does_not_work_is_skipped(machine: Machine) -> None:
    machine.add("docker", "import sys\nsys.exit('Cannot connect')")
    machine.add("podman", ENGINE)

    result = machine.mlg("build", MODEL)

    assert result.returncode == 0, result.stderr
    assert machine.calls()[-1][0] == "podman"


def test_the_engine_of_the_setting_is_used(machine: Machine) -> None:
    machine.add("docker", ENGINE)
    machine.add("podman", ENGINE)

    result = machine.mlg("build", MODEL, MLG_IMAGE_ENGINE=str(machine.folder / "bin" / "podman"))

    assert result.returncode == 0, result.stderr
    assert {call[0] for call in machine.calls()} == {"podman"}


@pytest.mark.parametrize(
    ("words", "changes", "engines", "status", "expected"),
    [
        ([MODEL], {}, [], 1, "No container engine is installed. Install docker, podman or buildah."),
        ([MODEL], {"FAKE_ENGINE_DOWN": "1"}, ["docker"], 1, "docker is installed but does not work (Cannot connect"),
        ([MODEL], {"MLG_IMAGE_ENGINE": "podman"}, ["docker"], 1, "no program podman"),
        ([MODEL], {"MLG_IMAGE_ENGINE": "kaniko"}, ["docker"], 2, "MLG_IMAGE_ENGINE='kaniko' is none of docker"),
        (["efficientnet_lite9"], {}, ["docker"], 1, "Did you mean efficientnet_lite0?"),
        ([MODEL, "--weights", "nowhere"], {}, ["docker"], 1, "There is no folder of weights nowhere"),
        ([MODEL, "--base", "nowhere"], {}, ["docker"], 1, "docker could not build the image (exit status 1)"),
        ([MODEL], {"FAKE_NOTHING_BUILT": "1"}, ["docker"], 1, f"produced no valid artefact of {MODEL}"),
        ([MODEL, "--tag", "No Good"], {}, ["docker"], 2, "'No Good' is not a valid name of a container image"),
        ([], {}, ["docker"], 2, "Missing argument 'MODEL...'"),
    ],
)
def test_a_failed_build_is_one_line_with_the_reason(
    machine: Machine, words: list[str], changes: dict[str, str], engines: list[str], status: int, expected: str
) -> None:
    for engine in engines:
        machine.add(engine, ENGINE)

    result = machine.mlg("build", *words, **changes)

    assert result.returncode == status
    assert expected in last_line(result)
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_building_without_a_source_checkout_is_an_error(machine: Machine) -> None:
    machine.add("docker", ENGINE)
    site = machine.folder / "site"
    for package in ("provider_image", "server", "batcher"):
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("Dockerfile", "__pycache__"))
    shutil.copy(ROOT / "mlg.py", site)

    result = subprocess.run(
        [sys.executable, str(site / "mlg.py"), "image", "build", MODEL],
        env=machine.variables({"PYTHONPATH": str(site)}),
        cwd=machine.folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )

    assert result.returncode == 1
    assert "Images are built from a source checkout of mlg" in last_line(result)


# models that are not compiled in the build


def in_context(machine: Machine) -> set[str]:
    """Return the artefact files in the context of the last build."""
    return {name.removeprefix("models/") for name in machine.context() if name.startswith("models/")}


def files_of(folder: Path) -> set[str]:
    """Return the files of an artefact that belong in a context."""
    names = ("model.json", *GRAPH_FILES, *(sample.file for sample in read_artefact(folder).samples))
    return {f"{folder.name}/{name}" for name in names}


def test_a_custom_model_is_copied_from_the_home_and_the_others_are_compiled(
    machine: Machine, custom_models_folder: Path
) -> None:
    machine.add("docker", ENGINE)
    folder = machine.install(custom_models_folder / "my_pets")
    (folder / "notes.txt").write_text("not part of the model")
    own, lite0 = read_artefact(folder).digest, find_artefact(machine.models, MODEL).digest

    result = machine.mlg("build", "My-Pets", MODEL)

    assert result.returncode == 0, result.stderr
    tag = f"mlg-provider:my_pets-{MODEL}"
    assert result.stdout == (f"{tag} holds my_pets (digest {own[:12]})\n{tag} holds {MODEL} (digest {lite0[:12]})\n")
    assert in_context(machine) == files_of(folder)
    assert f"MODEL=my_pets,{MODEL}" in machine.calls()[-1] and f"DIGEST={own},{lite0}" in machine.calls()[-1]


def test_installed_catalogue_models_are_copied_with_the_option(machine: Machine, custom_models_folder: Path) -> None:
    machine.add("docker", ENGINE)
    folders = [machine.install(machine.models / MODEL), machine.install(custom_models_folder / "my_pets")]

    result = machine.mlg("build", MODEL, "my_pets", "--installed", FAKE_MODELS="/nowhere")

    assert result.returncode == 0, result.stderr
    assert in_context(machine) == files_of(folders[0]) | files_of(folders[1])
    assert f"DIGEST={','.join(read_artefact(folder).digest for folder in folders)}" in machine.calls()[-1]
    assert all((folder / "model.bin").stat().st_nlink == 1 for folder in folders)


def test_the_home_can_be_an_option_and_is_not_changed(machine: Machine, custom_models_folder: Path) -> None:
    machine.add("docker", ENGINE)
    folder = machine.install(custom_models_folder / "my_pets")
    before = {path: path.read_bytes() for path in folder.iterdir()}

    result = machine.mlg("build", "my_pets", "--home", machine.folder / "home", MLG_HOME="/nowhere")

    assert result.returncode == 0, result.stderr
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.bin").write_bytes(data)


def truncate(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"")


def remove_the_description(folder: Path) -> None:
    (folder / "model.json").unlink()


def remove_a_sample(folder: Path) -> None:
    (folder / read_artefact(folder).samples[0].file).unlink()


def rename_the_model(folder: Path) -> None:
    text = (folder / "model.json").read_text()
    (folder / "model.json").write_text(text.replace('"name": "my_pets"', '"name": "my_cats"'))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (flip_a_bit, "model.bin has changed since it was made"),
        (truncate, "model.bin is cut short"),
        (remove_the_description, "my_pets is not installed here. Install it: mlg models compile my_pets --keras"),
        (remove_a_sample, "is missing. For the remedy run: mlg models check my_pets"),
        (rename_the_model, "contains the model 'my_cats'"),
    ],
)
def test_a_damaged_custom_model_is_one_error_line_before_anything_is_built(
    machine: Machine, custom_models_folder: Path, damage: Callable[[Path], None], expected: str
) -> None:
    machine.add("docker", ENGINE)
    damage(machine.install(custom_models_folder / "my_pets"))

    result = machine.mlg("build", MODEL, "my_pets")

    assert result.returncode == 1
    assert expected in result.stderr and len(result.stderr.splitlines()) == 1 and result.stdout == ""
    assert not (machine.folder / "calls").exists()


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (["my_pets"], 1, "There is no model 'my_pets'"),
        ([MODEL, "--installed"], 1, f"{MODEL} is not installed here. Install it: mlg models compile {MODEL}"),
        ([MODEL, "--installed", "--weights", "bin"], 2, "--weights has no effect"),
    ],
)
def test_a_model_that_is_not_installed_cannot_be_copied(
    machine: Machine, words: list[str], status: int, expected: str
) -> None:
    machine.add("docker", ENGINE)

    result = machine.mlg("build", *words)

    assert result.returncode == status
    assert expected in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_custom_model_is_published_and_recorded(
    machine: Machine, custom_models_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine.add("docker", ENGINE)
    machine.add("gvmkit-build", GVMKIT)
    folder = machine.install(custom_models_folder / "my_pets")
    assert machine.mlg("build", "my_pets").returncode == 0
    digest = read_artefact(folder).digest
    truncate(folder)  # the image is published, so a later change of the home has no effect
    machine.activate(monkeypatch)

    push_image(["My pets"], ImageSettings(models=folder.parent, registry="me/mlg"))

    entry = read_lock(lock_file(folder.parent))["my_pets"]
    assert (entry.image, entry.digest) == ("me/mlg:my_pets", digest)


def test_a_tag_is_required_only_if_the_names_of_the_models_are_too_long() -> None:
    assert image_tag(["vgg16", "vgg19"]) == "mlg-provider:vgg16-vgg19"
    assert image_tag([MODEL], "mine") == "mine:latest"
    assert image_tag([MODEL], "localhost:5000/mine") == "localhost:5000/mine:latest"
    with pytest.raises(ConfigError, match="--tag"):
        image_tag(["inception_resnet_v2"] * 8)


# push


def build_and_activate(machine: Machine, patch: pytest.MonkeyPatch, **changes: str) -> str:
    """Build an image, and let this process use the programs of the machine."""
    machine.add("docker", ENGINE)
    machine.add("gvmkit-build", GVMKIT)
    assert machine.mlg("build", MODEL).returncode == 0
    machine.activate(patch, **changes)
    return find_artefact(machine.models, MODEL).digest


NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def push_settings(home: Path) -> ImageSettings:
    return ImageSettings(models=home / "models", registry="me/mlg")


def published(name: str = "vgg16") -> PublishedImage:
    return PublishedImage(image=f"me/mlg:{name}", hash="a" * 56, digest="b" * 64, size_bytes=7, pushed_at=NOW)


def test_push_publishes_and_keeps_the_other_entries(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digest = build_and_activate(machine, monkeypatch)
    lock = tmp_path / "images.lock"
    add_to_lock({"vgg16": published()}, lock)

    push_image([MODEL], push_settings(tmp_path), clock=lambda: NOW)

    content = b"squashed mlg-provider:efficientnet_lite0"
    assert read_lock(lock) == {
        "vgg16": published(),
        MODEL: PublishedImage(
            image=f"me/mlg:{MODEL}",
            hash=hashlib.sha3_224(content).hexdigest(),
            digest=digest,
            size_bytes=len(content),
            pushed_at=NOW,
        ),
    }
    assert list(json.loads(lock.read_text())) == [MODEL, "vgg16"]
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"FAKE_GVMKIT": "login"}, "Log in: gvmkit-build --login"),
        ({"FAKE_GVMKIT": "engine"}, "It needs a docker service"),
        ({"FAKE_GVMKIT": "upload"}, "push again. Its output: Error: Image upload failed with code 500"),
        ({"FAKE_GVMKIT": "no_file"}, "wrote no image file"),
        ({"FAKE_GVMKIT": "other_hash"}, "did not report that it published"),
        ({"FAKE_ARCHITECTURE": "arm64"}, "is for arm64, but Golem's providers run amd64 only"),
    ],
)
def test_a_failed_push_names_the_remedy_and_does_not_change_the_lock_file(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, str], expected: str
) -> None:
    build_and_activate(machine, monkeypatch, **changes)
    lock = tmp_path / "images.lock"
    add_to_lock({"vgg16": published()}, lock)

    with pytest.raises(ContainerImageError, match=expected):
        push_image([MODEL], push_settings(tmp_path))

    assert read_lock(lock) == {"vgg16": published()}


def test_pushing_an_image_that_was_not_built_names_the_build_command(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build_and_activate(machine, monkeypatch)

    with pytest.raises(ContainerImageError, match=r"no image mlg-provider:vgg16\. Build it first: mlg image build"):
        push_image(["vgg16"], push_settings(tmp_path))
    with pytest.raises(ContainerImageError, match="do not name the model vgg16"):
        push_image(["vgg16"], push_settings(tmp_path), tag=f"mlg-provider:{MODEL}")


@pytest.mark.parametrize(
    ("programs", "changes", "status", "expected"),
    [
        (["docker"], {"MLG_IMAGE_REGISTRY": "me/mlg"}, 1, "pip install gvmkit-build"),
        (["docker", "gvmkit-build"], {}, 2, "MLG_IMAGE_REGISTRY=user/repository"),
        (
            ["docker", "gvmkit-build"],
            {"MLG_IMAGE_REGISTRY": "Just Me"},
            2,
            "MLG_IMAGE_REGISTRY='Just Me' does not have the form",
        ),
        (
            ["buildah", "gvmkit-build"],
            {"MLG_IMAGE_REGISTRY": "me/mlg"},
            1,
            "gvmkit-build takes images from docker only",
        ),
    ],
)
def test_a_push_that_cannot_begin_is_one_error_line(
    machine: Machine, programs: list[str], changes: dict[str, str], status: int, expected: str
) -> None:
    for program in programs:
        machine.add(program, GVMKIT if program == "gvmkit-build" else ENGINE)

    result = machine.mlg("push", MODEL, **changes)

    assert result.returncode == status
    assert expected in last_line(result) and "Traceback" not in result.stderr


# the lock file


def test_there_is_no_lock_file_before_the_first_push(tmp_path: Path) -> None:
    assert read_lock(tmp_path / "images.lock") == {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hash": "a" * 55}, "hash is"),
        ({"digest": None}, "digest is"),
        ({"image": "mlg:vgg16"}, "image is"),
        ({"size_bytes": True}, "size_bytes is"),
        ({"pushed_at": "yesterday"}, "yesterday"),
        ({"pushed_at": "2026-11-20T12:00:00"}, "no time zone"),
        ({"more": 1}, "exactly the fields"),
    ],
)
def test_a_damaged_entry_is_an_error_with_its_name(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    lock = tmp_path / "images.lock"
    add_to_lock({"vgg16": published()}, lock)
    lock.write_text(json.dumps({"vgg16": {**json.loads(lock.read_text())["vgg16"], **change}}))

    with pytest.raises(ContainerImageError, match=f"damaged at vgg16: .*{expected}"):
        read_lock(lock)


@pytest.mark.parametrize("text", ["", "[]", '{"No model\'s name": {}}', '{"vgg16": {}}', "{"])
def test_a_damaged_lock_file_is_an_error_and_is_never_overwritten(tmp_path: Path, text: str) -> None:
    lock = tmp_path / "images.lock"
    lock.write_text(text)

    with pytest.raises(ContainerImageError, match="damaged"):
        add_to_lock({"vgg16": published()}, lock)

    assert lock.read_text() == text
