"""The check of a model on this machine: its files, its results for the self-test images, its speed and memory.

Called by `mlg-provider check`, and in a separate process by `mlg models check`. Must not change a model: it builds no
missing model, as a chunk would, and repairs no damaged one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from provider_image.backends import Device, Net
from provider_image.cores import available_cores
from provider_image.environment import without_secrets
from provider_image.errors import BrokenArtefact, ConfigError, MlgError, NotInstalled
from provider_image.images.resampling import resampler
from provider_image.models.artefact import DIGEST_COVERS_FILES, Artefact, check_files, read_artefact
from provider_image.models.catalogue import CATALOGUE, install_command
from provider_image.models.processor import cpu_name
from provider_image.models.speed import Speed, write_speed
from provider_image.precision import TOLERANCE, TOLERANCE_BF16
from provider_image.runtime import peak_memory_bytes, versions
from provider_image.service import Difference, Output, Service, check_params, primary_input
from provider_image.service import check_files as check_output_files
from provider_image.services import load_service

logger = logging.getLogger(__name__)

#: Duration of the speed measurement.
SECONDS = 2.0
#: Timeout of a check in a separate process. Slow models take some seconds to load.
_TIMEOUT_SECONDS = 600.0
_PACKAGE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class ImageCheck:
    """The result of one self-test image."""

    #: File name in the artefact's folder.
    file: str
    #: Largest difference from the recorded result, see `Difference`; None if there was nothing to compare.
    difference: float | None = None
    #: What is wrong with it; None if it is ok.
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """The findings of a check. Where it ended early, later fields are empty."""

    #: The model's name and title.
    name: str
    title: str = ""
    #: The artefact's folder.
    folder: str
    #: The artefact's digest.
    digest: str = ""
    #: Size of the graph and its weights, and how those are stored: f32 or f16.
    size_bytes: int = 0
    storage: str = ""
    #: The program that gave the recorded results, for example `keras 3.15.1`.
    reference: str = ""
    #: What it takes: images, rows, texts or files.
    items: str = "images"
    #: f32, bf16 or auto, as it was asked for.
    precision: str
    #: In which it was computed: a copy in another precision always computes in its own.
    computed_in: str = ""
    #: Images processed at the same time.
    threads: int
    #: The processor's name, and program -> version.
    cpu: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    #: What resizes images: avx2, or pillow and why; empty for models that take none.
    resampler: str = ""
    #: Seconds to load the model in a new process, including the check of its files and the start of OpenVINO.
    load_seconds: float | None = None
    #: Largest allowed difference of a result; in f32 the top five labels must have the same order as well.
    tolerance: float | None = None
    #: The self-test images in the artefact's order. Named as in the JSON, which must not change.
    pictures: tuple[ImageCheck, ...] = ()
    #: Images per second with decoding, as in a chunk, and of the net alone.
    images_per_second: float | None = None
    net_images_per_second: float | None = None
    #: Peak memory of the process; 0 if the model was not loaded, or where the system does not provide it.
    peak_memory_bytes: int = 0
    #: What is not as it should be, and what to do, though it fails nothing; None if there is nothing.
    warning: str | None = None
    #: What is wrong and what to do; None if the model passed.
    problem: str | None = None

    @property
    def is_ok(self) -> bool:
        """Tell whether the model passed."""
        return self.problem is None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON, `ok` first."""
        return {"ok": self.is_ok, **asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> CheckReport:
        """Read what `to_json` returned. :raises TypeError, KeyError: it is something else."""
        facts = {key: value for key, value in document.items() if key != "ok"}
        return cls(**{**facts, "pictures": tuple(ImageCheck(**image) for image in facts["pictures"])})


def print_reports(reports: Iterable[CheckReport], *, as_json: bool, write: Callable[[str], object]) -> bool:
    """Write each report as soon as it is there. :return: whether all models passed."""
    is_ok = True
    for number, report in enumerate(reports):
        write(json.dumps(report.to_json()) if as_json else "\n".join([*[""] * bool(number), *describe(report)]))
        is_ok = is_ok and report.is_ok
    return is_ok


def describe(report: CheckReport) -> list[str]:
    """Return the report as lines of text, the verdict last; an image has a line only if there is a problem."""
    lines = [f"{report.name} ({report.title})" if report.title else report.name]

    def add_line(what: str, text: str) -> None:
        lines.append(f"  {what:<10} {text}")

    add_line("folder", report.folder)
    if report.digest:
        size = f"{report.size_bytes / 1e6:.1f} MB"
        add_line("artefact", f"digest {report.digest[:12]}, {size}, weights stored as {report.storage}")
    if report.load_seconds is not None:
        threads = f"{report.threads} thread{'' if report.threads == 1 else 's'}"
        add_line("machine", f"{report.cpu}, {threads}, computing in {report.computed_in}")
        # OpenVINO's version ends in its build and branch, which are left out.
        add_line("versions", ", ".join(f"{name} {text.partition('-')[0]}" for name, text in report.versions.items()))
        if report.resampler:
            add_line("resizing", report.resampler)
        add_line("loading", f"{report.load_seconds:.2f} s")
    if report.pictures:
        add_line("self-test", _self_test(report))
        lines += [f"  {'':<10} {image.file}: {image.problem}" for image in report.pictures if image.problem]
    if report.images_per_second is not None and report.net_images_per_second is not None:
        rates = (
            f"{report.images_per_second:.1f} {report.items}/s with decoding, {report.net_images_per_second:.1f} without"
        )
        add_line("speed", rates)
    if report.peak_memory_bytes:
        add_line("memory", f"{report.peak_memory_bytes / 1e6:.0f} MB at peak")
    if report.warning is not None:
        add_line("warning", report.warning)
    add_line("verdict", "ok" if report.problem is None else f"FAILED: {report.problem}")
    return lines


def _self_test(report: CheckReport) -> str:
    passed = sum(image.problem is None for image in report.pictures)
    differences = [image.difference for image in report.pictures if image.difference is not None]
    text = f"{passed} of {len(report.pictures)} {report.items} give the recorded results ({report.reference})"
    if not differences or report.tolerance is None:
        return text
    return f"{text}; largest difference {max(differences):.2g}, allowed {report.tolerance:.2g}"


def check_model(
    folder: Path, device: Device | None = None, *, installed_as: str | None = None, seconds: float = SECONDS
) -> CheckReport:
    """Check the artefact in a folder, in this process. The report has the problem that was found, if any.

    :param device: None takes the CPU with all its cores, and f32.
    :param installed_as: the name of the model in requests; None if the folder is not in a models folder.
    :param seconds: duration of the speed measurement; that of the net alone takes half as long.
    :raises ConfigError: there is no such precision.
    """
    device = device or Device()
    threads, precision = device.threads, device.precision
    report = CheckReport(name=folder.name, folder=str(folder), precision=precision, threads=threads, cpu=cpu_name())
    try:
        if not (folder / "model.json").exists():
            if folder.name in CATALOGUE and not folder.exists():
                raise NotInstalled(
                    f"It is not installed in {folder.parent}. Install it: {install_command(folder.name)}"
                )
            raise NotInstalled(f"{folder} has no artefact: model.json is missing. Name a folder that has one.")
        artefact = read_artefact(folder)
        report = replace(
            report,
            name=artefact.name,
            title=artefact.title,
            digest=artefact.digest,
            size_bytes=artefact.size_bytes,
            storage=artefact.precision,
            reference=artefact.reference,
            tolerance=tolerance(artefact, precision),
            computed_in=precision if artefact.reduced is None else artefact.computes_in,
            warning=None if artefact.format >= DIGEST_COVERS_FILES else _renewal_hint(artefact),
        )
        if installed_as not in (None, artefact.name):
            raise BrokenArtefact(f"The folder {folder} holds the model {artefact.name}. Rename it to that.")
        if not artefact.samples:
            raise BrokenArtefact(
                f"It has no self-test images, so its results cannot be checked. {_repair_hint(artefact)}"
            )
        check_files(artefact)
        inputs, expected, images = _read_samples(artefact)
        report = replace(report, pictures=images)
        _raise_if_wrong(artefact, images)
        service = load_service(artefact.service)
        kind = service.inputs[primary_input(service)].kind
        report = replace(report, items=f"{kind}s", resampler=str(resampler()) if kind == "image" else "")
        started = time.perf_counter()
        net = service.load(artefact, device)
        report = replace(report, load_seconds=time.perf_counter() - started)
        benchmark = _Benchmark(service=service, artefact=artefact, net=net, inputs=inputs, expected=expected)
        images = benchmark.compare_all(precision)
        report = replace(report, pictures=images, versions=versions())
        _raise_if_wrong(artefact, images)
        report = replace(report, images_per_second=benchmark.rate(benchmark.run_item, threads, seconds))
        items = [benchmark.prepare_item(number) for number in range(len(inputs))]
        rate_of_net = benchmark.rate(lambda number: benchmark.run(items[number]), threads, seconds / 2)
        report = replace(report, net_images_per_second=rate_of_net)
    except ConfigError:
        raise
    except MlgError as error:
        report = replace(report, problem=error.reason)
    except Exception as error:
        # A bug in a service or a library. It must not prevent the check of further models.
        logger.exception("check failed", extra={"model": report.name})
        report = replace(
            report, problem=f"The check itself failed ({type(error).__name__}: {error}). Please report this."
        )
    if report.load_seconds is None:
        return report  # the memory that the model needs was not measured
    return replace(report, peak_memory_bytes=peak_memory_bytes())


def check_in_process(folder: Path, models: Path, *, threads: int | None, precision: str) -> CheckReport:
    """Check a model in a separate process, and store its speed if it is installed in `models`.

    The memory is then that of a provider with this model only, without that of the caller or of models checked before.
    The folder may come from a stranger: the process has no network, reads no other files of the user, and has limits on
    memory and time. If it crashes, the report says so.
    """
    options = ["--models", str(models.absolute()), "--precision", precision]
    options += [] if threads is None else ["--threads", str(threads)]
    report = CheckReport(
        name=folder.name, folder=str(folder), precision=precision, threads=threads or available_cores()
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "provider_image", "check", str(folder.absolute()), "--json", "--confined", *options],
            cwd=_PACKAGE.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            env={**without_secrets(os.environ), "PYTHONSAFEPATH": ""},  # the package is found by the working folder
            check=False,
        )
    except subprocess.TimeoutExpired:
        return replace(report, problem=f"The check did not finish within {_TIMEOUT_SECONDS:.0f} seconds.")
    try:
        report = CheckReport.from_json(json.loads(done.stdout))
    except (ValueError, TypeError, KeyError):
        stderr_lines = done.stderr.decode(errors="replace").strip().splitlines()
        ending = (
            f"was killed by signal {-done.returncode}"
            if done.returncode < 0
            else f"exited with status {done.returncode}"
        )
        hint = "Check whether there is enough memory." if done.returncode == -9 else ""
        return replace(report, problem=" ".join([f"The process of the check {ending}.", hint, *stderr_lines[-1:]]))
    record_speed(report, models.absolute())
    return report


def record_speed(report: CheckReport, models: Path) -> bool:
    """Store the speed of an intact model that is installed in a models folder. :return: False if it was not stored.

    Only a speed in f32 on all cores, the defaults of a worker, is stored, so that models can be compared.
    """
    is_default = report.precision == "f32" and report.threads == available_cores()
    if not report.is_ok or not is_default or report.images_per_second is None:
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


def tolerance(artefact: Artefact, precision: str) -> float:
    """Return the largest allowed difference of a result. Results are recorded before weights are stored as f16.

    That of a copy in another precision is the one with which it was judged: other processors compute other numbers.
    """
    if artefact.reduced is not None:
        return artefact.reduced.bound
    if precision != "f32":
        return TOLERANCE_BF16
    if artefact.precision != "f16" or artefact.storage is None:
        return TOLERANCE
    return min(TOLERANCE + artefact.storage.largest_difference, TOLERANCE_BF16)


def _read_samples(artefact: Artefact) -> tuple[list[dict[str, bytes]], list[Output], tuple[ImageCheck, ...]]:
    """Read the inputs of the self-test, by name, and what is recorded for them."""
    inputs, expected, images = [], [], []
    first = primary_input(load_service(artefact.service))
    for sample in artefact.samples:
        data, problem = _read_sample_file(artefact, sample.file, sample.sha256)
        read: dict[str, dict[str, bytes]] = {"inputs": {first: data}, "files": {}}
        for kind, found in read.items():
            for name, (file, sha256) in getattr(sample, kind).items():
                found[name], other_problem = _read_sample_file(artefact, file, sha256)
                problem = problem or (other_problem and f"{file} {other_problem}")
        files = read["files"]
        inputs.append(read["inputs"])
        expected.append(Output(data=sample.output, files=files))
        images.append(ImageCheck(file=sample.file, problem=problem))
    return inputs, expected, tuple(images)


def _read_sample_file(artefact: Artefact, file: str, sha256: str) -> tuple[bytes, str | None]:
    """Read a file of the self-test. :return: its content, and why it cannot be used."""
    try:
        data = (artefact.folder / file).read_bytes()
    except OSError as error:
        return b"", f"cannot be read ({error.strerror})"
    has_changed = hashlib.sha256(data).hexdigest() != sha256
    return data, "has changed since the model was built" if has_changed else None


def _raise_if_wrong(artefact: Artefact, images: Sequence[ImageCheck]) -> None:
    wrong = [image for image in images if image.problem is not None]
    if not wrong:
        return
    which = f"{len(wrong)} of {len(images)} self-test images"
    if all(image.difference is None for image in wrong):
        raise BrokenArtefact(f"{which} cannot be used. {_repair_hint(artefact)}")
    raise BrokenArtefact(
        f"{which} give other results than recorded. {_repair_hint(artefact)} "
        "If the check still fails, do not offer the model on this machine."
    )


def _repair_hint(artefact: Artefact) -> str:
    needs_file = artefact.name in CATALOGUE and artefact.source == "own"
    return f"Delete {artefact.folder}, then: {artefact.install_command}{' --weights FILE' * needs_file}"


def _renewal_hint(artefact: Artefact) -> str:
    return (
        f"Its digest does not cover its files, because it has format {artefact.format}: other weights could pass as "
        f"this model. To renew it: {_repair_hint(artefact)}"
    )


@dataclass(frozen=True, kw_only=True)
class _Benchmark:
    """A loaded model and its self-test images."""

    service: Service
    artefact: Artefact
    net: Net
    inputs: Sequence[Mapping[str, bytes]]
    #: What is recorded for each.
    expected: Sequence[Output]

    def params(self) -> Mapping[str, Any]:
        """Return the default parameters."""
        return check_params(self.service.params, {})

    def prepare_item(self, number: int) -> Any:
        """Decode one image."""
        return self.service.prepare(self.artefact, self.inputs[number], self.params())

    def run(self, item: Any) -> Output:
        """Run what was decoded."""
        return self.service.run(self.net, [item], [self.params()])[0]

    def run_item(self, number: int) -> Output:
        """Decode and run one image, like an item of a chunk."""
        return self.run(self.prepare_item(number))

    def compare_all(self, precision: str) -> tuple[ImageCheck, ...]:
        """Run all images and compare the results with the recorded ones."""
        allowed = tolerance(self.artefact, precision)
        results = [self._compare(number, allowed) for number in range(len(self.inputs))]
        scale = max((each.scale for each in results if isinstance(each, Difference)), default=1.0)
        checks = []
        for sample, found in zip(self.artefact.samples, results, strict=True):
            if isinstance(found, str):
                checks.append(ImageCheck(file=sample.file, problem=found))
                continue
            largest, problem = found.largest * found.scale / scale, None
            if not largest <= allowed:  # also true for nan
                problem = f"the result differs by {largest:.2g} from the recorded one, allowed is {allowed:.2g}"
            elif precision == self.artefact.computes_in == "f32" and not found.is_same_order:
                problem = "the top five labels are in another order"
            checks.append(ImageCheck(file=sample.file, difference=largest, problem=problem))
        return tuple(checks)

    def _compare(self, number: int, allowed: float) -> Difference | str:
        """Run one image. :return: how its result differs from the recorded one, or why that cannot be said."""
        expected = self.expected[number]
        try:
            if expected.files or not self.service.outputs:
                check_output_files(self.service.outputs, expected.files)
                self.service.check_output(self.artefact, self.params(), expected)
        except MlgError as error:
            return f"the recorded result is invalid: {error.reason}"
        try:
            return self.service.compare(expected, self.run_item(number), allowed)
        except MlgError as error:
            return error.reason

    def rate(self, run_item: Callable[[int], object], threads: int, seconds: float) -> float:
        """Measure the images per second of that many threads; each finishes its current image when the time is over."""

        def loop(first: int, limit: float) -> float:
            started, done, elapsed = time.perf_counter(), 0, 0.0
            while not done or elapsed < limit:
                done += 1
                run_item((first + done) % len(self.inputs))
                elapsed = time.perf_counter() - started
            # The threads end at different times, which matters for a slow model: each has its own rate.
            return done / elapsed

        with ThreadPoolExecutor(threads, thread_name_prefix="check") as pool:
            list(pool.map(loop, range(threads), [0.1 * seconds] * threads))  # warms up every thread and stream
            return sum(pool.map(loop, range(threads), [seconds] * threads))
