"""Checks an installed model on this machine: are its files whole, does it answer as recorded, how quickly.

Called by `mlg-provider check`, and through a process of its own by `mlg models check`. Changes nothing: it neither
builds a missing model, as a chunk would, nor mends a damaged one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from provider_image.check_report import CheckReport, ImageCheck
from provider_image.cores import available_cores
from provider_image.errors import BrokenArtefact, ConfigError, MlgError, NotInstalled
from provider_image.models.artefact import Artefact, check_files, compute_digest, read_artefact
from provider_image.models.catalogue import CATALOGUE, custom_install_command, install_command
from provider_image.models.speed import Speed, write_speed
from provider_image.precision import TOLERANCE, TOLERANCE_BF16
from provider_image.runtime import cpu_name, peak_memory_bytes, versions
from provider_image.service import Service
from provider_image.services import load_service

logger = logging.getLogger(__name__)

#: How long the speed is measured.
SECONDS = 2.0
#: A check in a process of its own is given up after this long. Slow models need some seconds to load.
_TIMEOUT_SECONDS = 600.0
_PACKAGE = Path(__file__).parent


def check_model(
    folder: Path,
    *,
    threads: int | None = None,
    precision: str = "f32",
    installed_as: str | None = None,
    seconds: float = SECONDS,
) -> CheckReport:
    """Check the artefact in a folder in this process. Whatever is wrong with it stands in the report.

    :param threads: pictures side by side; None takes as many as there are cores.
    :param precision: f32, bf16 or auto.
    :param installed_as: the name that requests know it by; None if it is not in a models folder.
    :param seconds: how long the speed is measured; the net alone gets half of it.
    :raises ConfigError: there is no such precision.
    """
    threads = threads or available_cores()
    report = CheckReport(name=folder.name, folder=str(folder), precision=precision, threads=threads, cpu=cpu_name())
    try:
        if not (folder / "model.json").exists():
            raise _no_artefact(folder)
        artefact = read_artefact(folder)
        report = replace(
            report,
            name=artefact.name,
            title=artefact.title,
            digest=artefact.digest,
            size_bytes=artefact.size_bytes,
            storage=artefact.storage.kept,
            reference=artefact.reference,
            tolerance=_tolerance(artefact, precision),
        )
        if installed_as not in (None, artefact.name):
            raise BrokenArtefact(f"The folder {folder} holds the model {artefact.name}. Rename it to that.")
        _check_facts(artefact)
        check_files(artefact)
        inputs, pictures = _read_images(artefact)
        report = replace(report, pictures=pictures)
        _raise_if_wrong(artefact, pictures)
        service = load_service(artefact.service)
        started = time.perf_counter()
        net = service.load(artefact, threads, precision)
        report = replace(report, load_seconds=time.perf_counter() - started)
        benchmark = _Benchmark(service=service, artefact=artefact, net=net, inputs=inputs)
        pictures = tuple(
            benchmark.compare(number, _tolerance(artefact, precision), precision) for number in range(len(inputs))
        )
        report = replace(report, pictures=pictures, versions=versions())
        _raise_if_wrong(artefact, pictures)
        report = replace(
            report,
            images_per_second=benchmark.rate(benchmark.run_item, threads, seconds),
            net_images_per_second=benchmark.rate(benchmark.net_only(), threads, seconds / 2),
        )
    except ConfigError:
        raise
    except MlgError as error:
        report = replace(report, problem=error.reason)
    except Exception as error:
        # A bug in a service or a library. Whoever checks several models wants to hear of the others too.
        logger.exception("check failed", extra={"model": report.name})
        report = replace(
            report, problem=f"The check itself failed ({type(error).__name__}: {error}). Please report this."
        )
    if report.load_seconds is None:
        return report  # how much memory the model takes did not show
    return replace(report, peak_memory_bytes=peak_memory_bytes())


def check_in_process(folder: Path, models: Path, *, threads: int | None, precision: str) -> CheckReport:
    """Check a model in a process of its own, and remember its speed if it is installed in `models`.

    The memory is then that of a provider with this one model: not that of whoever asks, nor of a model checked before.
    A model that takes its process down is a finding like any other.
    """
    options = ["--models", str(models.absolute()), "--precision", precision]
    options += [] if threads is None else ["--threads", str(threads)]
    report = CheckReport(
        name=folder.name, folder=str(folder), precision=precision, threads=threads or available_cores()
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "provider_image", "check", str(folder.absolute()), "--json", *options],
            cwd=_PACKAGE.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            env={**os.environ, "PYTHONSAFEPATH": ""},  # the package is found by the working folder
            check=False,
        )
    except subprocess.TimeoutExpired:
        return replace(report, problem=f"The check did not end within {_TIMEOUT_SECONDS:.0f} seconds.")
    try:
        return CheckReport.from_json(json.loads(done.stdout))
    except (ValueError, TypeError, KeyError):
        stderr_lines = done.stderr.decode(errors="replace").strip().splitlines()
        ending = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        cure = "Look whether there is enough memory." if done.returncode == -9 else ""
        return replace(report, problem=" ".join([f"The process that checked it {ending}.", cure, *stderr_lines[-1:]]))


def record_speed(report: CheckReport, models: Path) -> bool:
    """Remember the speed of a sound model that is installed in a models folder.

    Only what was measured as chunks are run by default, with f32 on every core: others do not compare from row to row.
    """
    is_usual = report.precision == "f32" and report.threads == available_cores()
    if not report.is_ok or not is_usual or report.images_per_second is None:
        return False
    if Path(report.folder) != models / report.name:
        return False
    speed = Speed(
        digest=report.digest,
        images_per_second=round(report.images_per_second, 2),
        threads=report.threads,
        precision=report.precision,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return write_speed(models, report.name, speed)


def _no_artefact(folder: Path) -> NotInstalled:
    row = CATALOGUE.get(folder.name)
    if row is not None and not folder.exists():
        return NotInstalled(f"It is not installed in {folder.parent}. Install it: {install_command(row)}")
    return NotInstalled(f"{folder} is no artefact: there is no model.json in it. Name a folder that has one.")


def _tolerance(artefact: Artefact, precision: str) -> float:
    """Return what a probability may differ by: the answers are recorded before f16 storage takes its share of them."""
    if precision != "f32":
        return TOLERANCE_BF16
    stored = artefact.storage.largest_difference if artefact.storage.kept == "f16" else 0.0
    return min(TOLERANCE + stored, TOLERANCE_BF16)


def _check_facts(artefact: Artefact) -> None:
    """Check that the digest is that of what model.json says, and that there is a self-test."""
    if compute_digest(artefact.row, artefact.labels, artefact.weights_sha256, artefact.recipe) != artefact.digest:
        raise BrokenArtefact(
            f"Its digest is not that of what its model.json says: that was altered. {_repair_hint(artefact)}"
        )
    if not artefact.samples:
        raise BrokenArtefact(
            f"It has no self-test pictures, so nothing tells whether it is sound. {_repair_hint(artefact)}"
        )


def _read_images(artefact: Artefact) -> tuple[list[bytes], tuple[ImageCheck, ...]]:
    inputs, pictures = [], []
    for sample in artefact.samples:
        problem = None
        try:
            data = (artefact.folder / sample.file).read_bytes()
        except OSError as error:
            data, problem = b"", f"cannot be read ({error.strerror})"
        if problem is None and hashlib.sha256(data).hexdigest() != sample.sha256:
            problem = "the file has changed since the artefact was made"
        inputs.append(data)
        pictures.append(ImageCheck(file=sample.file, problem=problem))
    return inputs, tuple(pictures)


def _raise_if_wrong(artefact: Artefact, pictures: Sequence[ImageCheck]) -> None:
    wrong = [picture for picture in pictures if picture.problem is not None]
    if not wrong:
        return
    which = f"{len(wrong)} of {len(pictures)} self-test pictures"
    if all(picture.difference is None for picture in wrong):
        raise BrokenArtefact(f"{which} cannot be used. {_repair_hint(artefact)}")
    raise BrokenArtefact(
        f"{which} are answered otherwise than recorded. {_repair_hint(artefact)} "
        "If it still fails then, do not offer the model on this machine."
    )


def _repair_hint(artefact: Artefact) -> str:
    row = CATALOGUE.get(artefact.name)
    if row is None:
        command = custom_install_command(artefact.name)
    else:
        command = install_command(row) + (" --weights FILE" if artefact.source == "own" else "")
    return f"Delete {artefact.folder}, then: {command}"


@dataclass(frozen=True, kw_only=True)
class _Benchmark:
    """A loaded model and its self-test pictures."""

    service: Service
    artefact: Artefact
    net: Any
    inputs: Sequence[bytes]

    def prepare_item(self, number: int) -> Any:
        """Decode one picture."""
        return self.service.prepare(self.artefact, dict.fromkeys(self.service.inputs, self.inputs[number]))

    def run_item(self, number: int) -> None:
        """Decode and run one picture, as a chunk's item."""
        self.service.run(self.net, self.prepare_item(number))

    def net_only(self) -> Callable[[int], None]:
        """Decode the pictures once, and return what runs one of them."""
        items = [self.prepare_item(number) for number in range(len(self.inputs))]

        def run(number: int) -> None:
            self.service.run(self.net, items[number])

        return run

    def compare(self, number: int, tolerance: float, precision: str) -> ImageCheck:
        """Run one picture and compare the answer with the recorded one."""
        sample = self.artefact.samples[number]
        try:
            self.service.check_output(self.artefact, sample.output)
        except MlgError as error:
            return ImageCheck(file=sample.file, problem=f"the recorded answer is none: {error.reason}")
        try:
            output = self.service.run(self.net, self.prepare_item(number))
        except MlgError as error:
            return ImageCheck(file=sample.file, problem=error.reason)
        found = self.service.compare(sample.output, output, tolerance)
        problem = None
        if not found.largest <= tolerance:  # refuses nan as well
            problem = f"a probability differs by {found.largest:.2g}, allowed are {tolerance:.2g}"
        elif precision == "f32" and not found.is_same_order:
            problem = "the five likeliest labels come in another order"
        return ImageCheck(file=sample.file, difference=found.largest, problem=problem)

    def rate(self, run_item: Callable[[int], None], threads: int, seconds: float) -> float:
        """Measure how many pictures a second that many threads do; each finishes the one it is at when time is up."""

        def loop(first: int, limit: float) -> float:
            started = time.perf_counter()
            for done in itertools.count(1):
                run_item((first + done) % len(self.inputs))
                elapsed = time.perf_counter() - started
                if elapsed >= limit:
                    # Threads end at different times; with each one's own rate a slow model needs no common end.
                    return done / elapsed
            raise AssertionError("a count never ends")

        with ThreadPoolExecutor(threads, thread_name_prefix="check") as pool:
            list(pool.map(loop, range(threads), [0.1 * seconds] * threads))  # every thread and stream gets warm
            return sum(pool.map(loop, range(threads), [seconds] * threads))
