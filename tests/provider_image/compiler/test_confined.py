"""What a process that builds from a stranger's file cannot do, and how its end is reported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from provider_image.compiler import confined
from provider_image.compiler.custom import CustomModel
from provider_image.errors import CompilationFailed, ConfigError, ModelError, NotInstalled, UnsuitableModel
from provider_image.system_calls import MIN_LANDLOCK, landlock_version
from tests.custom_models import classifier, edit_keras_file, labels_file, save
from tests.process_tree import is_alive
from tests.provider_image.conftest import ROOT
from tests.timing import wait_until


def run(models: Path, function: str, **options: Any) -> None:
    confined.build(f"tests.confined_builders:{function}", models, "pets", **options)


def test_it_opens_no_socket_and_traces_no_process(tmp_path: Path) -> None:
    with pytest.raises(UnsuitableModel, match=r"^EPERM EPERM EPERM -1 EPERM$"):
        run(tmp_path, "open_sockets")


@pytest.mark.skipif(landlock_version() < MIN_LANDLOCK, reason="the kernel cannot restrict files")
def test_it_reads_what_its_arguments_name_and_writes_into_the_models_folder_only(tmp_path: Path) -> None:
    given = tmp_path / "given"
    for path in (given, tmp_path / "secret"):
        path.write_text("file")

    with pytest.raises(UnsuitableModel, match=r"^file EACCES EACCES ok ok$"):
        confined.build("tests.confined_builders:use_files", tmp_path / "models", "pets", given)


def test_relative_paths_mean_the_same_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UnsuitableModel, match=re.escape(str(tmp_path))):
        run(Path("models"), "name_folder")


def test_it_cannot_take_more_memory_than_allowed(tmp_path: Path) -> None:
    with pytest.raises(CompilationFailed, match="MemoryError"):
        run(tmp_path, "take_memory", max_bytes=1 << 30)


def test_it_cannot_take_more_processor_time_than_allowed(tmp_path: Path) -> None:
    with pytest.raises(CompilationFailed, match=r"SIGXCPU.* 1 s of processor time"):
        run(tmp_path, "spin", max_cpu_seconds=1)


def test_a_crash_is_reported_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CompilationFailed, match="SIGSEGV"):
        run(tmp_path / "models", "crash")

    assert [path.name for path in (tmp_path / "models").iterdir()] == [".pets.lock"]


def test_it_has_no_secrets_and_nothing_it_prints_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YAGNA_APPKEY", "secret")
    monkeypatch.setenv("REGISTRY_TOKEN", "secret")
    steps: list[str] = []

    with pytest.raises(UnsuitableModel, match=r"^\[\]$"):
        run(tmp_path, "chatter", on_step=steps.append)

    assert steps == ["one[2J"]


def test_a_model_is_only_installed_if_it_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotInstalled):
        run(tmp_path, "lie")


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    code = f"import pathlib; from provider_image.compiler import confined; p = pathlib.Path({str(tmp_path)!r}); "
    code += "confined.build('tests.confined_builders:stay', p, 'pets')"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until((tmp_path / "pid").exists)
    child = int((tmp_path / "pid").read_text())

    parent.kill()
    parent.wait()

    wait_until(lambda: not is_alive(child))


def test_a_small_file_that_describes_a_huge_network_is_refused(tmp_path: Path) -> None:
    def enlarge(config: dict[str, Any]) -> None:
        config["config"]["layers"][-1]["config"]["units"] = 2 * 10**9

    file = edit_keras_file(save(classifier(), tmp_path / "small.keras"), tmp_path / "huge.keras", enlarge)
    custom = CustomModel(name="pets", file=file, labels=labels_file(tmp_path, "cat", "dog", "parrot"))

    with pytest.raises(ModelError):
        confined.build("provider_image.compiler.custom:build", tmp_path / "models", "pets", custom, max_bytes=4 << 30)

    assert [path.name for path in (tmp_path / "models").iterdir()] == [".pets.lock"]


def test_a_name_that_is_no_name_never_becomes_a_path(tmp_path: Path) -> None:
    custom = CustomModel(name="../pets", file=tmp_path / "x.keras", labels=tmp_path / "x.txt")

    with pytest.raises(ConfigError, match="not a valid name"):
        confined.build("provider_image.compiler.custom:build", tmp_path / "models", "../pets", custom)

    assert list(tmp_path.iterdir()) == []
