"""Fixtures for the tests of every package. Those of session scope cost nothing to a test that does not ask for them."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import inspect
import io
import itertools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import flask.testing
import pytest
from werkzeug.routing import Rule

from server.app import create_app
from server.settings import ServerSettings
from store.requests import Answer, RequestRecord
from store.states import RequestState
from store.store import Store
from tests.process_tree import ends_with_tests
from tests.stores import open_store
from tests.timing import DEADLINE_SECONDS

if TYPE_CHECKING:
    from devnet.daemon import Devnet

ROOT = Path(__file__).parents[1]
MODEL = "efficientnet_lite0"
DevnetRunner = Callable[..., "AbstractAsyncContextManager[Devnet]"]
#: A stored output: twenty rows.
OUTPUT = [[f"n{20 - i:08d}", f"label_{i}", round((20 - i) / 210, 6)] for i in range(20)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each process its share of the slow tests, at the start of its part: what is left at the end is short.

    xdist's `worksteal` first gives each process an equally long part of the list. Slow tests that share a parameter
    stay together, because they share what is expensive to make.
    """
    count = getattr(config, "workerinput", {}).get("workercount", 1)
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is not None:
            parameter = (
                item.callspec.id if isinstance(item, pytest.Function) and hasattr(item, "callspec") else item.name
            )
            groups.setdefault(f"{item.path} {parameter}", []).append(item)
    parts: list[list[pytest.Item]] = [[] for _ in range(count)]
    for number, group in enumerate(groups.values()):
        parts[number % count].extend(group)
    others = iter([item for item in items if item.get_closest_marker("slow") is None])
    length = -(-len(items) // count)
    for part in parts:
        part.extend(itertools.islice(others, max(0, length - len(part))))
    items[:] = [item for part in parts for item in part] + list(others)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an async test in an event loop of its own."""
    test = pyfuncitem.function
    if not inspect.iscoroutinefunction(test):
        return None
    asyncio.run(test(**{name: pyfuncitem.funcargs[name] for name in inspect.signature(test).parameters}))
    return True


@pytest.fixture(scope="session", autouse=True)
def compiled_routes() -> Iterator[None]:
    """Have Werkzeug compile each route once in a process: most of the time in which an application is made."""
    compile_route, compiled = Rule._compile_builder, {}

    def compile_once(rule: Rule, append_unknown: bool = True) -> Any:
        key = (append_unknown, rule.rule, repr(rule.defaults), tuple(rule._trace))
        if key not in compiled:
            compiled[key] = compile_route(rule, append_unknown)
        return compiled[key]

    with mock.patch.object(Rule, "_compile_builder", compile_once):
        yield


@pytest.fixture(scope="session")
def photos() -> dict[str, bytes]:
    """Real photos as JPEG files of good quality: chelsea (a cat), coffee and rocket, from scikit-image's wheel."""
    import skimage.data
    from PIL import Image

    found = {}
    for name in ("chelsea", "coffee", "rocket"):
        file = io.BytesIO()
        Image.fromarray(getattr(skimage.data, name)()).save(file, "JPEG", quality=95)
        found[name] = file.getvalue()
    return found


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder in which efficientnet_lite0 is installed. Shared, so a test must not change it."""
    from provider_image.compiler import ensure_installed

    folder = tmp_path_factory.mktemp("models")
    ensure_installed(folder, "efficientnet_lite0")
    return folder


@pytest.fixture(scope="session")
def embedding_models_folder(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with efficientnet_lite0 and its embedding. Shared, so a test must not change it."""
    from provider_image.compiler import ensure_installed

    folder = tmp_path_factory.mktemp("embedding-models")
    (folder / "efficientnet_lite0").symlink_to(models_folder / "efficientnet_lite0")
    ensure_installed(folder, "efficientnet_lite0_embedding")
    return folder


@pytest.fixture(scope="session")
def trained_models_folder(embedding_models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with an embedding and `ratings`, a regression that was trained on it. Must not be changed."""
    from tests.trained_models import BACKBONE, install_ratings

    folder = tmp_path_factory.mktemp("trained-models")
    (folder / BACKBONE).symlink_to(embedding_models_folder / BACKBONE)
    install_ratings(folder)
    return folder


@pytest.fixture(scope="module")
def registered_extensions() -> Iterator[Path]:
    """The services and the backend of `tests/extension`, in this process; returns the folder for PYTHONPATH."""
    from tests.extensions import FOLDER, refresh_extensions

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        refresh_extensions()
        yield FOLDER
    refresh_extensions()


@pytest.fixture(scope="session")
def extension_models_folder(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with efficientnet_lite0 and those of `tests/extension`. Shared, so a test must not change it."""
    from tests.extensions import install_extension_models

    folder = install_extension_models(tmp_path_factory.mktemp("extension-models"))
    (folder / "efficientnet_lite0").symlink_to(models_folder / "efficientnet_lite0")
    return folder


@pytest.fixture(scope="session")
def custom_models_folder(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with efficientnet_lite0 and `my_pets`, a user's own classifier of three. Must not be changed."""
    from provider_image.compiler.custom import CustomModel, build
    from tests.custom_models import classifier, labels_file, save

    folder = tmp_path_factory.mktemp("own-models")
    (folder / "efficientnet_lite0").symlink_to(models_folder / "efficientnet_lite0")
    file_folder = tmp_path_factory.mktemp("own-file")
    labels = labels_file(file_folder, "cat", "dog", "parrot")
    build(
        folder,
        CustomModel(
            name="my_pets", file=save(classifier(), file_folder / "pets.keras"), labels=labels, title="My pets"
        ),
    )
    return folder


@pytest.fixture
def settings(tmp_path: Path, models_folder: Path) -> ServerSettings:
    """A home in which the starter model is installed."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(models_folder)
    return ServerSettings(home=home, server_threads=4)


@pytest.fixture
def extension_settings(tmp_path: Path, extension_models_folder: Path, registered_extensions: Path) -> ServerSettings:
    """A home with the models of `tests/extension`, whose services are registered in this process."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(extension_models_folder)
    return ServerSettings(home=home, server_threads=4)


@pytest.fixture
def store(settings: ServerSettings) -> Iterator[Store]:
    """A migrated store."""
    store = open_store(settings)
    yield store
    store.close()


@pytest.fixture
def client(settings: ServerSettings, store: Store) -> flask.testing.FlaskClient:
    """The application, called without a network."""
    return create_app(settings, store).test_client()


@pytest.fixture
def answer(store: Store) -> Callable[..., list[str]]:
    """Answer, or fail, everything that is queued, as a batcher would; returns the ids."""

    def answer_all(*, fail_with: str | None = None, output: Any = OUTPUT) -> list[str]:
        now = datetime.now(UTC)
        claims = store.requests.claim(
            models=[MODEL], limit=100, now=now, lease_ends_at=now + timedelta(seconds=30), oldest_before=None
        )
        if fail_with is not None:
            store.requests.fail(claims, code="broken_image", reason=fail_with, now=now)
        else:
            answers = [
                Answer(claim=claim, output=output, digest="d" * 64, chunk_id="c1", provider="local", seconds=0.01)
                for claim in claims
            ]
            store.requests.finish(answers, now=now)
        return [claim.id for claim in claims]

    return answer_all


@pytest.fixture
def stored_state(settings: ServerSettings, store: Store) -> Callable[[], tuple[list[str], int]]:
    """Everything that an upload leaves: the files under blobs, and how many rows."""

    def inspect() -> tuple[list[str], int]:
        files = sorted(str(path) for path in settings.images.rglob("*") if path.is_file())
        return files, len(store.requests.list(limit=10_000))

    return inspect


def single_request(requests: list[RequestRecord], state: RequestState) -> RequestRecord:
    """The one request, which must be in this state."""
    (request,) = requests
    assert request.state is state
    return request


@dataclass
class RunningServer:
    """A real server."""

    process: subprocess.Popen[bytes]
    base: str
    home: Path

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(DEADLINE_SECONDS)


@pytest.fixture
def devnet(tmp_path: Path) -> DevnetRunner:
    """Run a devnet in the event loop of an async test until a block ends; the arguments are those of `run_devnet`."""
    from tests.devnet.running import run_devnet

    return functools.partial(run_devnet, tmp_path)


@pytest.fixture
def server_variables() -> dict[str, str]:
    """The environment variables of `server`."""
    return {}


@pytest.fixture
def server(start_server: Callable[..., RunningServer], server_variables: dict[str, str]) -> RunningServer:
    """A real server on the home of `store`."""
    return start_server(**server_variables)


@pytest.fixture
def start_server(tmp_path: Path, settings: ServerSettings) -> Iterator[Callable[..., RunningServer]]:
    """Start `mlg serve` on a free port and the home of `store`; several may run at once.

    `ready_fd` is the least number of the descriptor on which it reports that it is ready.
    """
    running: list[RunningServer] = []

    def start(*arguments: str, ready_fd: int = 0, **variables: str) -> RunningServer:
        reader, low = os.pipe()
        writer = fcntl.fcntl(low, fcntl.F_DUPFD, ready_fd)  # the first that is free from there on
        os.close(low)
        with (tmp_path / "serve.log").open("ab") as log:
            process = subprocess.Popen(
                ends_with_tests(
                    *(sys.executable, "-m", "mlg", "serve", "--home", str(settings.home), "--port", "0"),
                    *("--ready-fd", str(writer), *arguments),
                ),
                cwd=ROOT,
                stdout=log,
                stderr=log,
                pass_fds=[writer, *(int(value) for value in arguments if value.isdigit())],
                env={**os.environ, "MLG_SERVER_THREADS": "8", **variables},
                start_new_session=True,
            )
        os.close(writer)
        with os.fdopen(reader) as ready:
            line = ready.readline()
        assert line, (tmp_path / "serve.log").read_text()
        host, port = line.split()
        running.append(RunningServer(process, f"http://{host}:{port}", settings.home))
        return running[-1]

    yield start
    for server in running:
        if server.process.poll() is None:
            server.stop()
    if running:
        # Shown when a test has failed.
        logging.getLogger("tests").info("the server logged:\n%s", (tmp_path / "serve.log").read_text()[-4000:])
