"""The image of the devnet: what is in it, and that only it, downloaded and unchanged, can be deployed."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from devnet.image import Image, ImageUnusable, build_image, load_image
from tests.conftest import DevnetRunner
from tests.devnet.exe_units import exe_unit, run_batch
from tests.devnet.requestor import RequestorRunner, run_command, single_provider


def install(home: Path, model: str, content: str) -> Path:
    """Install something like a model. A new version replaces the files, as an installation does."""
    folder = home / "models" / model
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "new").write_text(content)
    return (folder / "new").rename(folder / "model.json")


def test_an_image_keeps_the_models_that_were_installed_when_it_was_built(tmp_path: Path) -> None:
    install(tmp_path / "home", "vgg16", "first")
    first = build_image(tmp_path / "image", tmp_path / "home")
    install(tmp_path / "home", "vgg16", "second")
    install(tmp_path / "home", "resnet50", "later")

    assert (tmp_path / "image/models/vgg16/model.json").read_text() == "first"
    assert [path.name for path in (tmp_path / "image/models").iterdir()] == ["vgg16"]
    assert first.home == str(tmp_path / "image")

    second = build_image(tmp_path / "image", tmp_path / "home")

    assert (tmp_path / "image/models/vgg16/model.json").read_text() == "second"
    assert second.hash != first.hash
    assert build_image(tmp_path / "image", tmp_path / "home").hash == second.hash


async def test_a_deploy_fails_unless_the_demand_names_the_image_and_its_hash(
    devnet: DevnetRunner, requestor: RequestorRunner
) -> None:
    async with requestor(single_provider()) as client:
        name, _, url = client.devnet.variables["MLG_GOLEM_IMAGE"].partition("@")
        for package, reason in (
            (f"hash:sha3:{name}:{url}", None),
            (f"hash:sha3:{'0' * 56}:{url}", "does not have the hash"),
            (f"hash:sha3:{name}:{url}0", "cannot be downloaded"),
            ("", "must be hash:sha3:HASH:URL"),
        ):
            properties = {"golem.srv.comp.task_package": package}
            agreement_id = await client.agree(await client.subscribe("(golem.runtime.name=vm)", **properties))
            activity_id = await client.activity(agreement_id)
            (deployed, *_) = await client.results(activity_id, await client.execute(activity_id))
            assert deployed["result"] == ("Error" if reason else "Ok"), package
            assert reason is None or reason in deployed["message"]
            await client.destroy(activity_id)
            await client.terminate(agreement_id)


def test_a_file_of_another_kind_is_no_image() -> None:
    content = json.dumps({"other": {}}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_port}/image.gvmi"
        with pytest.raises(ImageUnusable, match="only the image that it publishes"):
            load_image(f"hash:sha3:{hashlib.sha3_224(content).hexdigest()}:{url}")


async def test_a_run_of_a_program_that_is_not_in_the_image_fails(tmp_path: Path) -> None:
    program = {"/usr/local/bin/mine": "/bin/true"}
    async with exe_unit(tmp_path, image=Image(programs=program)) as unit:
        for path, result in (
            ("/usr/local/bin/mine", "Ok"),
            ("/usr/local/bin/mlg-provider", "Error"),
            ("true", "Error"),
        ):
            (found,) = await run_batch(unit, run_command(path))
            assert found["result"] == result, path
