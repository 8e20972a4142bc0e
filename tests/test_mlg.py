"""The command line itself: it starts fast, an error is one line, and the exit status is right."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

import mlg
from provider_image.errors import ConfigError
from store.errors import DiskFull
from tests.timing import DEADLINE_SECONDS, slowness

ROOT = Path(__file__).parents[1]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlg", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        env={**os.environ, **variables},
    )


def test_help_lists_every_command_and_imports_none() -> None:
    code = "import sys, mlg\ntry:\n    mlg.main(['--help'])\nexcept SystemExit:\n    print(*sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    text, _, modules = done.stdout.rstrip("\n").rpartition("\n")
    assert all(name in text for name in mlg.COMMANDS)
    assert not {"flask", "openvino", "granian", "rich", "httpx", "numpy", "server", "batcher"} & set(modules.split())


def test_help_is_fast() -> None:
    def once() -> float:
        began = time.perf_counter()
        run("--help")
        return time.perf_counter() - began

    # 0.05 s on two idle cores.
    assert min(once() for _ in range(5)) < 0.5 * slowness()


@pytest.mark.parametrize("name", list(mlg.COMMANDS))
def test_every_command_of_the_table_exists(name: str) -> None:
    done = run(name, "--help")

    assert done.returncode == 0, done.stderr
    assert "xample" in done.stdout


def test_the_version_is_printed() -> None:
    done = run("--version")

    assert (done.returncode, done.stdout.startswith("mlg ")) == (0, True)


def test_the_error_for_a_mistyped_command_suggests_the_nearest() -> None:
    done = run("sevre")

    assert done.returncode == 2
    assert "Did you mean serve?" in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DiskFull("The disk is full."), 1, "mlg: The disk is full.\n"),
        (ConfigError("MLG_PORT='x' is no number."), 2, "mlg: MLG_PORT='x' is no number.\n"),
        (DiskFull("The disk\x1b]0;owned\x07 is full."), 1, "mlg: The disk ]0;owned  is full.\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 0, ""),
        (click.UsageError("No such thing."), 2, "Error: No such thing.\n"),
        (click.exceptions.Exit(3), 3, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("debug", ["", "1"])
def test_an_error_is_one_line_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    line: str,
    debug: str,
) -> None:
    @click.command()
    def failing() -> None:
        raise error

    monkeypatch.setattr(mlg.LazyGroup, "get_command", lambda *_: failing)
    monkeypatch.setenv("MLG_DEBUG", debug)
    # On a broken pipe the command replaces stdout by /dev/null.
    saved_stdout = os.dup(1)

    with pytest.raises(SystemExit) as end:
        mlg.main(["serve"])

    os.dup2(saved_stdout, 1)
    os.close(saved_stdout)
    errors = capfd.readouterr().err
    assert end.value.code == status
    assert errors.strip().endswith(line.strip())
    has_traceback = debug == "1" and isinstance(error, DiskFull | ConfigError | KeyboardInterrupt)
    assert ("Traceback" in errors) == has_traceback
    assert has_traceback or errors.strip().count("\n") == (3 if isinstance(error, click.UsageError) else 0)


def test_a_reader_that_closes_the_pipe_causes_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m mlg models --json | head -n 1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "MLG_HOME": str(tmp_path)},
        timeout=DEADLINE_SECONDS,
    )

    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
