"""Images per second of other servers and of `mlg up`: the same images, model and client, in turns.

Each peer is installed in an environment of its own, outside of this project, in the versions below. All compute the
same, the peers by the code in `peer_servers/classifier.py`: Pillow decodes and resizes, OpenVINO infers in f32, on as
many processes or threads as there are cores. mlg resizes by its compiled part, to the same pixels. Each peer is
configured as its documentation advises for throughput. All get the images as forms over the same number of connections
that stay open. A peer answers when it has computed, and keeps nothing; mlg answers when the image is safe on the disk,
and its time ends when the last answer is recorded there.

The plain limit is one process that decodes and infers in one thread for each core, without HTTP and store.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from provider_image.compiler import ensure_installed
from provider_image.cores import available_cores
from scripts.benchmarks.support import photos, processes
from scripts.benchmarks.support.measuring import in_turns, medians, print_table, rounds_option, timed, work_folder
from tests.process_tree import cpu_seconds, descendants
from tests.system import System

MODEL = "efficientnet_lite0"
SERVERS = Path(__file__).parents[1] / "peer_servers"
CONSTRAINTS = Path(__file__).parents[3] / "constraints.txt"
#: What every environment gets in the version that mlg uses.
SHARED = ("numpy", "openvino", "pillow")
LIMIT, OURS = "plain limit", "mlg up"
INSTALLED = "installed.txt"
#: What a server that does not answer as it should causes.
FAILURES = (OSError, RuntimeError, ValueError, http.client.HTTPException)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A server to compare with."""

    #: For pip.
    requirements: tuple[str, ...]
    #: Words after the environment's Python; {port} and {cores} are filled in.
    command: tuple[str, ...]
    #: Environment variables.
    variables: tuple[tuple[str, str], ...] = ()


PEERS = {
    "LitServe": Peer(
        requirements=("litserve==0.2.19", "python-multipart==0.0.34"),
        command=(str(SERVERS / "litserve_server.py"), "{port}"),
    ),
    "BentoML": Peer(
        requirements=("bentoml==1.4.40",),
        command=(
            *("-m", "bentoml", "serve", "bentoml_server:Service", "--working-dir", str(SERVERS)),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
        variables=(("BENTOML_DO_NOT_TRACK", "True"),),
    ),
    "FastAPI": Peer(
        requirements=("fastapi==0.165.0", "uvicorn[standard]==0.54.0", "python-multipart==0.0.34"),
        command=(
            *("-m", "uvicorn", "--app-dir", str(SERVERS), "fastapi_server:app", "--no-access-log"),
            *("--host", "127.0.0.1", "--port", "{port}", "--workers", "{cores}"),
        ),
    ),
    "Ray Serve": Peer(
        requirements=("ray[serve]==2.60.0", "python-multipart==0.0.34"),
        command=(str(SERVERS / "ray_server.py"), "{port}"),
        variables=(
            ("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1"),
            ("RAY_SERVE_ENABLE_HA_PROXY", "1"),
            ("RAY_USAGE_STATS_ENABLED", "0"),
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one turn of a server showed."""

    #: Images per second.
    rate: float
    #: Milliseconds of processor time per image, of the server and what it started.
    cost: float
    #: The first labels of the photos that all images are variants of.
    labels: tuple[str, ...]


def environment_of(folder: Path, peer: Peer) -> Path:
    """Install a peer, unless that was done before. :return: its Python. :raises RuntimeError: that fails."""
    pins = re.findall(rf"^(?:{'|'.join(SHARED)})==.*$", CONSTRAINTS.read_text(), re.MULTILINE)
    wanted = "\n".join((sys.version, *peer.requirements, *pins))
    stamp, python = folder / INSTALLED, folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        if folder.exists():
            if not (folder / "pyvenv.cfg").exists():
                raise RuntimeError(f"{folder} is there and is no environment. Choose another folder: --environments")
            shutil.rmtree(folder)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in ([sys.executable, "-m", "venv", str(folder)], [*install, *peer.requirements, *pins]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr or done.stdout).strip() or f"status {done.returncode}"
                raise RuntimeError(said.splitlines()[-1])
        stamp.write_text(wanted)
    return python


def form(jpeg: bytes) -> tuple[bytes, str]:
    """Put an image into a form with the field `image`. :return: the body, and its content type."""
    boundary = "mlgbenchmarkboundary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n'
    body = head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + jpeg + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"


def post_all(url: str, jpegs: list[bytes], connections: int) -> list[Any]:
    """Post images over some connections at once. :return: the answers, in another order."""
    forms = [form(jpeg) for jpeg in jpegs]
    with ThreadPoolExecutor(connections) as pool:
        parts = pool.map(lambda first: processes.post_each(url, forms[first::connections]), range(connections))
        return [answer for part in parts for answer in part]


def measured(pid: int, count: int, work: Callable[[], None]) -> tuple[float, float]:
    """Time what a process and those below it do. :return: images per second, milliseconds of processor per image."""

    def processor_seconds() -> float:
        used = 0.0
        for each in (pid, *descendants(pid)):
            with contextlib.suppress(OSError):  # ended meanwhile
                used += cpu_seconds(each)
        return used

    before = processor_seconds()
    seconds = timed(work)
    return count / seconds, 1000 * (processor_seconds() - before) / count


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent to each server."""

    #: The photos, which are sent first, and the same ones in many variants.
    originals: list[bytes]
    jpegs: list[bytes]
    connections: int

    def warm_up(self) -> list[bytes]:
        """Return images for each process to begin with."""
        return photos.variants(self.originals, 4 * self.connections, 1_000_000_000)


@contextlib.contextmanager
def peer_running(python: Path, peer: Peer, model: Path, home: Path) -> Iterator[tuple[str, int]]:
    """Run a peer until the block ends. :return: its address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, cores = f"http://127.0.0.1:{port}/predict", str(available_cores())
    home.mkdir(exist_ok=True)
    variables = {
        **os.environ,
        **dict(peer.variables),
        "PEER_MODEL": str(model),
        "PEER_CORES": cores,
        "PYTHONPATH": str(SERVERS),
        # What they write to the home of whoever starts them.
        "HOME": str(home),
    }
    command = [str(python), *(word.format(port=port, cores=cores) for word in peer.command)]
    log = home / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=variables, start_new_session=True)
    try:
        image, deadline = photos.photo_jpegs()[:1], time.monotonic() + 180
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"it did not start: {log.read_text(errors='replace').strip()[-300:]}")
            with contextlib.suppress(*FAILURES):
                processes.post_each(url, [form(image[0])])
                break
            time.sleep(0.2)
        yield url, process.pid
    finally:
        # Some leave processes behind. Not by their numbers, which others may have by then.
        left = []
        for pid in descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                left.append(os.pidfd_open(pid))
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()
        for descriptor in left:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)


def run_peer(python: Path, peer: Peer, model: Path, home: Path, load: Load) -> Seen:
    """Measure a peer once."""
    with peer_running(python, peer, model, home) as (url, pid):
        labels = tuple(processes.post_each(url, [form(each)])[0][0][0] for each in load.originals)
        post_all(url, load.warm_up(), load.connections)
        rate, cost = measured(pid, len(load.jpegs), lambda: post_all(url, load.jpegs, load.connections))
    return Seen(rate=rate, cost=cost, labels=labels)


def run_ours(home: Path, load: Load) -> Seen:
    """Measure `mlg up` once, from the first POST until every answer is recorded."""
    system = System(home)
    url = f"{system.base}/requestPrediction/{MODEL}"

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 600
        while (states := dict(system.query("SELECT state, count(*) FROM requests GROUP BY state"))) != {"done": count}:
            if time.monotonic() > deadline:
                raise RuntimeError(f"not answered within 10 minutes: {states}")
            if "failed" in states:
                raise RuntimeError(f"{states['failed']} failed")
            time.sleep(0.02)

    def work() -> None:
        post_all(url, load.jpegs, load.connections)
        wait_for(before + len(load.jpegs))

    try:
        first = processes.post_each(url, [form(each) for each in load.originals])
        labels = tuple(system.answer(each["req_id"])["preds"][0][1] for each in first)
        post_all(url, load.warm_up(), load.connections)
        before = len(load.originals) + len(load.warm_up())
        wait_for(before)
        rate, cost = measured(system.process.pid, len(load.jpegs), work)
    finally:
        system.stop()
    return Seen(rate=rate, cost=cost, labels=labels)


def run_limit(model: Path, load: Load) -> Seen:
    """Decode and infer in one thread for each core of this process, once."""
    from scripts.benchmarks.peer_servers.classifier import Classifier

    cores = available_cores()
    classifier = Classifier(model, cores)
    labels = tuple(classifier.classify(each)[0][0] for each in load.originals)
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(classifier.classify, load.warm_up()))
        rate, cost = measured(os.getpid(), len(load.jpegs), lambda: list(pool.map(classifier.classify, load.jpegs)))  # type: ignore[arg-type]
    return Seen(rate=rate, cost=cost, labels=labels)


def default_environments() -> Path:
    """Return the folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlg-peers"


@click.command()
@click.option("--images", "count", default=1000, show_default=True, help="Number of images in a turn.")
@rounds_option(5)
@click.option("--connections", default=16, show_default=True, help="Connections of the client.")
@click.option(
    "--environments", type=click.Path(path_type=Path), help="Folder of environments.  [default: ~/.cache/mlg-peers]"
)
@click.option("--peers", "names", default=",".join(PEERS), show_default=True, help="Which ones, in this order.")
def main(count: int, rounds: int, connections: int, environments: Path | None, names: str) -> None:
    """Compare with other servers. Example: scripts/bench peers --images 400 --rounds 3

    The first run installs each peer in an environment of its own, which takes minutes and about 1.8 GB.
    """
    chosen = [name for name in names.split(",") if name]
    unknown = [name for name in chosen if name not in PEERS]
    if unknown:
        raise click.BadParameter(f"there is no {unknown[0]}; there are: {', '.join(PEERS)}", param_hint="--peers")
    environments = (environments or default_environments()).absolute()
    environments.mkdir(parents=True, exist_ok=True)
    missing: dict[str, str] = {}
    pythons: dict[str, Path] = {}
    for name in chosen:
        try:
            pythons[name] = environment_of(environments / name.lower().replace(" ", "_"), PEERS[name])
        except (RuntimeError, OSError) as error:
            missing[name] = f"not installed: {error}"
    base = photos.photo_jpegs()

    def load(turn: int) -> Load:
        return Load(originals=base, jpegs=photos.variants(base, count, turn * count), connections=connections)

    with work_folder() as folder:
        model = ensure_installed(folder / "models", MODEL).folder

        def attempt(name: str, turn: int) -> Seen | None:
            if name in missing:
                return None
            try:
                return run_peer(pythons[name], PEERS[name], model, folder / f"{name}-home", load(turn))
            except FAILURES as error:
                missing[name] = f"not measured: {' '.join(str(error).split())}"
                return None

        ways: dict[str, Callable[[int], Seen | None]] = {
            LIMIT: lambda turn: run_limit(model, load(turn)),
            OURS: lambda turn: run_ours(folder / f"home-{turn}", load(turn)),
            **{name: lambda turn, name=name: attempt(name, turn) for name in pythons},  # type: ignore[misc]
        }
        seen = in_turns(rounds, ways)
    report(seen, missing, f"{count} JPEGs of 113 KB, 800 x 600, {MODEL}, {connections} connections, {rounds} rounds")


def report(seen: dict[str, list[Seen | None]], missing: dict[str, str], title: str) -> None:
    """Print the medians, and what could not be measured."""
    turns = {name: [each for each in turn if each] for name, turn in seen.items() if name not in missing}
    median = {name: medians((each.rate, each.cost) for each in all_) for name, all_ in turns.items()}
    limit, ours = median[LIMIT][0], median[OURS][0]
    expected = turns[LIMIT][0].labels
    rows = []
    for name, (rate, cost) in median.items():
        runs = " ".join(f"{each.rate:.0f}" for each in turns[name])
        same = all(each.labels == expected for each in turns[name])
        shares = (f"{rate / limit:.0%}", f"{ours / rate:.2f}")
        rows.append((with_version(name), f"{rate:.0f}", runs, *shares, f"{cost:.1f}", "yes" if same else "NO"))
    rows += [(with_version(name), reason, *[""] * 5) for name, reason in missing.items()]
    head = (
        "what",
        "images/s",
        "runs",
        "of the limit",
        "mlg up is times as fast",
        "processor ms per image",
        "same labels",
    )
    print_table(title, head, rows)


def with_version(name: str) -> str:
    """Return the name of a peer with its version."""
    return f"{name} {PEERS[name].requirements[0].partition('==')[2]}" if name in PEERS else name
