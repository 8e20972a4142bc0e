"""The Dockerfiles, as far as their text shows; `scripts/check_image` builds and runs the container images."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from batcher.image_build.context import SOURCES
from tests.timing import DEADLINE_SECONDS

ROOT = Path(__file__).parents[1]
PROVIDER, REQUESTOR = ROOT / "provider_image/Dockerfile", ROOT / "Dockerfile"
#: A name with brackets is a pattern, which may match nothing.
MAY_BE_MISSING = {"weight[s]": "weights", "model[s]": "models"}
BOTH = pytest.mark.parametrize("file", [PROVIDER, REQUESTOR], ids=["provider", "requestor"])


def stages(file: Path) -> dict[str, list[str]]:
    """Parse a Dockerfile: stage -> its instructions; "" has those before the first stage."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, list[str]] = {"": []}
    name = ""
    for instruction in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        words = instruction.split()
        if words and words[0] == "FROM":
            name = words[3]
            assert words[2] == "AS" and name not in found
            found[name] = []
        if words:
            found[name].append(" ".join(words))
    return found


def final(file: Path) -> list[str]:
    return list(stages(file).values())[-1]


def of_kind(kind: str, instructions: list[str]) -> list[str]:
    return [instruction for instruction in instructions if instruction.startswith(f"{kind} ")]


@BOTH
def test_copied_files_exist_and_are_not_ignored(file: Path) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    sources = [
        source
        for instructions in stages(file).values()
        for copy in of_kind("COPY", instructions)
        if "--from" not in copy
        for source in copy.split()[1:-1]
    ]

    assert sources and ignore[1] == "*"
    for source in sources:
        assert MAY_BE_MISSING.get(source, source) in allowed, source
        if source not in MAY_BE_MISSING:
            assert (ROOT / source).exists(), source
            assert file == REQUESTOR or source in SOURCES, source


@BOTH
def test_the_final_stage_only_copies(file: Path) -> None:
    instructions = final(file)

    assert instructions[0].startswith("FROM ${BASE} AS ")
    assert not of_kind("RUN", instructions) and not of_kind("ADD", instructions)
    assert all("--from=builder" in copy for copy in of_kind("COPY", instructions))
    assert not re.search("tensorflow|keras|pip", "\n".join(instructions))


@BOTH
def test_every_install_is_pinned_and_the_base_can_be_chosen(file: Path) -> None:
    found = stages(file)
    commands = "\n".join(found["builder"])
    installs = re.findall(r"pip install [^&;]*", commands)

    assert "ARG BASE=python:3.11-slim-bookworm" in found[""]
    assert installs and all("--constraint " in install and "--no-cache-dir" in install for install in installs)
    # Also what packages are built with: pip and setuptools come first, and builds use these.
    assert installs[0].endswith("pip setuptools ")
    of_project = [install for install in installs if re.search(r" (/src|\"\.\$extra\")$", install.rstrip())]
    assert len(of_project) == 1 and "--no-build-isolation" in of_project[0]
    constraints = (ROOT / "constraints.txt").read_text()
    assert all(re.search(rf"^{name}==", constraints, re.MULTILINE) for name in ("pip", "setuptools"))
    assert "prune_runtime" in commands and not re.search("https?://|index-url", commands)


@BOTH
def test_it_runs_as_an_unprivileged_user_who_owns_the_volumes(file: Path) -> None:
    instructions = final(file)
    volumes = [volume for line in of_kind("VOLUME", instructions) for volume in line.split()[1:]]

    expected = ["/golem/input", "/golem/output", "/golem/work"] if file == PROVIDER else ["/var/lib/mlg"]
    assert volumes == expected
    assert of_kind("USER", instructions) == ["USER 10001:10001"]
    owned = [copy.split()[-1] for copy in of_kind("COPY", instructions) if "--chown=10001:10001" in copy]
    assert all(any(volume.startswith(folder.rstrip("/")) for folder in owned) for volume in volumes)


@BOTH
def test_it_is_labelled(file: Path) -> None:
    instructions = final(file)
    labels = dict(re.findall(r'([\w.]+)="([^"]*)"', " ".join(of_kind("LABEL", instructions))))

    assert {"title", "description", "licenses", "version"} <= {name.rpartition(".")[2] for name in labels}
    if file == PROVIDER:
        assert (labels["mlg.model"], labels["mlg.digest"]) == ("${MODEL}", "${DIGEST}")
        assert {"ARG MODEL=efficientnet_lite0", "ARG DIGEST=", "ARG VERSION="} <= set(instructions)


def test_the_provider_build_installs_tensorflow_only_to_compile_keras_models() -> None:
    commands = " ".join(stages(PROVIDER)["builder"])

    assert re.search(r"""case .* in \*" keras "\*\) extra='\[compile\]' ;; \*\) extra='' ;; esac""", commands)
    assert "numpy openvino pillow ${BACKENDS} " in commands and "--no-deps" in commands
    assert "ARG BACKENDS=" in stages(PROVIDER)["builder"]


@BOTH
def test_the_compiled_part_is_built_where_a_compiler_can_be_installed(file: Path) -> None:
    compiler = of_kind("RUN", stages(file)["builder"])[0]
    commands = " ".join(stages(file)["builder"])

    assert compiler.startswith("RUN command -v gcc ") and " gcc libc6-dev " in compiler
    assert compiler.split("||")[-1].lstrip().startswith("echo ")
    if file == PROVIDER:
        built = commands.index("setup.py --quiet build_ext --inplace")
        assert built < commands.index("cp -R provider_image /image/code") < commands.index("$code/images/*.c")


def test_the_provider_image_ships_without_the_compiler() -> None:
    commands = stages(PROVIDER)["builder"][-1]
    copied = commands.index("cp -R provider_image /image/code/opt/mlg/")
    removed = commands.index("rm -rf $code/compiler ")

    assert (ROOT / "provider_image/compiler").is_dir()
    assert "code=/image/code/opt/mlg/provider_image" in commands[copied:removed]
    # The final stage copies it from nowhere else.
    sources = [copy.split()[-2] for copy in of_kind("COPY", final(PROVIDER))]
    assert sources == ["/image/runtime/", "/image/code/", "/image/models/", "/image/golem/"]


def test_the_provider_build_checks_given_artefacts_with_its_runtime_before_it_installs_or_compiles() -> None:
    check, compile = of_kind("RUN", stages(PROVIDER)["builder"])[-2:]

    assert 'if [ -d "/models/$model" ]; then cp -R' in check
    assert re.search(r"PYTHONPATH=/image/runtime/opt/mlg .*python3 -m provider_image check \$taken", check)
    assert "set -eu" in check and not re.search("pip|compile", check)
    assert compile.index('if [ ! -d "/build/models/$model" ]') < compile.index("pip install")


def test_the_requestor_serves_and_has_a_health_check() -> None:
    instructions = final(REQUESTOR)

    assert "EXPOSE 5000" in instructions and 'CMD ["mlg", "up"]' in instructions
    assert "/healthz" in of_kind("HEALTHCHECK", instructions)[0]
    assert "MLG_HOME=/var/lib/mlg" in " ".join(of_kind("ENV", instructions))


def test_the_requestor_keeps_what_yapapi_imports() -> None:
    commands = " ".join(stages(REQUESTOR)["builder"])

    assert "setuptools" not in " ".join(re.findall(r"pip uninstall [^&]*", commands))
    assert commands.index("prune_runtime /opt/mlg") < commands.index("import yapapi")


def test_pruning_refuses_a_folder_without_the_packages(tmp_path: Path) -> None:
    (tmp_path / "openvino").mkdir()

    result = subprocess.run(
        [ROOT / "scripts/prune_runtime", tmp_path],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )

    assert result.returncode == 1 and "does not contain openvino, numpy and PIL" in result.stderr
    assert (tmp_path / "openvino").is_dir()


def test_the_scripts_are_executable_and_valid() -> None:
    for name in ("scripts/check_image", "scripts/prune_runtime", "provider_image/mlg-provider"):
        assert (ROOT / name).stat().st_mode & 0o111 == 0o111, name
        shell = "bash" if name.endswith("check_image") else "sh"
        subprocess.run([shell, "-n", ROOT / name], timeout=DEADLINE_SECONDS, check=True)
