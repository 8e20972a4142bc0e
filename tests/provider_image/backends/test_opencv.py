"""OpenCV is loaded so that it takes neither threads nor much memory, and artefacts say which method they need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from provider_image.backends import Device
from provider_image.backends.opencv import METHOD_FILE, METHODS, load_net
from provider_image.compiler import ensure_installed
from provider_image.compiler.installing import with_files
from provider_image.errors import BrokenArtefact
from provider_image.models.artefact import Artefact
from tests.provider_image.conftest import ROOT
from tests.timing import DEADLINE_SECONDS

#: Prints the threads of a process, the megabytes that it has allocated and the variable, before and after the import.
CODE = """
import os, numpy
from provider_image.backends.opencv import import_opencv
from provider_image.cores import allocated_bytes
def facts(): return len(os.listdir("/proc/self/task")), allocated_bytes() >> 20, os.environ.get("OPENBLAS_NUM_THREADS")
before = facts()
import_opencv()
print(*before, *facts())
"""


@pytest.mark.parametrize("variable", [None, "2"])
def test_it_takes_no_thread_and_little_memory(variable: str | None) -> None:
    environment = {} if variable is None else {"OPENBLAS_NUM_THREADS": variable}

    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_SECONDS,
    )

    threads, megabytes, *rest = done.stdout.split()
    assert (int(rest[1]), rest[0], rest[3]) == (int(threads), str(variable), str(variable))
    assert int(rest[2]) - int(megabytes) < 60


@pytest.fixture
def artefact(tmp_path: Path) -> Artefact:
    return ensure_installed(tmp_path, "quality")


@pytest.mark.parametrize(
    "document",
    [
        {"method": "no_such_method", "options": {}},
        {"method": "quality"},
        {"method": "quality", "options": {"more": 1}},
        {"method": ["quality"], "options": {}},
        [],
    ],
)
def test_method_that_cannot_be_made_is_a_broken_artefact(artefact: Artefact, document: object) -> None:
    (artefact.folder / METHOD_FILE).write_text(json.dumps(document))

    with pytest.raises(BrokenArtefact, match=r"cannot be loaded.*mlg models compile quality"):
        load_net(with_files(artefact, [METHOD_FILE]), Device(threads=1))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_refuses_options_that_it_does_not_have(name: str, artefact: Artefact) -> None:
    (artefact.folder / METHOD_FILE).write_text(json.dumps({"method": name, "options": {"no_such_option": 1}}))

    with pytest.raises(BrokenArtefact, match="has no options"):
        load_net(with_files(artefact, [METHOD_FILE]), Device(threads=1))
