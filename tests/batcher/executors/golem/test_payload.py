"""The demand of a model: which image or runtime it asks for, and what is wrong when there is none."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from batcher.errors import GolemUnavailable
from batcher.executors.golem.payload import make_payload
from batcher.executors.golem.settings import GolemSettings
from batcher.image_build.lock import PublishedImage, add_to_lock, lock_file
from provider_image.errors import ConfigError
from provider_image.models.artefact import find_artefact

MODEL, HASH = "efficientnet_lite0", "ab" * 28


@contextlib.asynccontextmanager
async def registry(status: int = 200) -> AsyncIterator[str]:
    """Run an image registry that returns the address of an image, as Golem's does, and that serves the image too."""

    async def info(request: web.Request) -> web.Response:
        url = f"http://{request.host}/image.gvmi"
        found = {"http": url, "https": url, "sha3": request.query["hash"], "size": 4096}
        return web.json_response(found, status=status)

    async def image(request: web.Request) -> web.Response:
        return web.Response(status=status)

    app = web.Application()
    app.add_routes([web.get("/v1/image/info", info), web.get("/image.gvmi", image)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
def models(tmp_path: Path, models_folder: Path) -> Path:
    """The folder of models of a home without a lock file."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/models").symlink_to(models_folder)
    return tmp_path / "home/models"


def publish(models: Path, digest: str = "") -> None:
    """Record in the home that the model is published."""
    image = PublishedImage(
        image="me/mlg:lite0",
        hash=HASH,
        digest=digest or find_artefact(models, MODEL).digest,
        size_bytes=4096,
        pushed_at=datetime(2026, 11, 20, tzinfo=UTC),
    )
    add_to_lock({MODEL: image}, lock_file(models))


async def demand(models: Path, **variables: str) -> Any:
    """Make a demand. :return: yapapi's builder, which has its properties and constraints."""
    payload = await make_payload(MODEL, "tag.owner", models, GolemSettings.from_env(variables))
    from yapapi.props.builder import DemandBuilder

    builder = DemandBuilder()
    await payload.decorate_demand(builder)
    return builder


async def test_a_published_image_is_named_by_its_hash_and_the_address_that_the_registry_returns(models: Path) -> None:
    publish(models)
    async with registry() as url:
        found = await demand(models, MLG_GOLEM_REGISTRY=url)

    assert found.properties["golem.srv.comp.task_package"] == f"hash:sha3:{HASH}:{url}/image.gvmi"
    assert "(golem.runtime.name=vm)" in found.constraints
    assert "(golem.inf.cpu.architecture=x86_64)" in found.constraints


async def test_the_image_of_the_setting_replaces_published_ones(models: Path) -> None:
    publish(models, digest="0" * 64)
    async with registry() as url:
        found = await demand(models, MLG_GOLEM_IMAGE=f"{HASH}@{url}/image.gvmi")

    assert found.properties["golem.srv.comp.task_package"] == f"hash:sha3:{HASH}:{url}/image.gvmi"


async def test_a_built_in_runtime_needs_no_image(models: Path) -> None:
    found = await demand(models, MLG_GOLEM_RUNTIME="mine")

    assert "golem.srv.comp.task_package" not in found.properties
    assert "(golem.runtime.name=mine)" in found.constraints


async def test_without_an_image_or_a_runtime_the_error_names_the_commands(models: Path) -> None:
    with pytest.raises(GolemUnavailable, match=r"mlg image build efficientnet_lite0.*mlg image push.*MLG_GOLEM_IMAGE"):
        await demand(models)


async def test_a_published_image_with_another_build_of_the_model_is_an_error(models: Path) -> None:
    publish(models, digest="0" * 64)

    with pytest.raises(GolemUnavailable, match="mlg image push efficientnet_lite0"):
        await demand(models)


async def test_an_image_that_cannot_be_found_is_an_error(models: Path) -> None:
    publish(models)
    async with registry(status=500) as url:
        with pytest.raises(GolemUnavailable, match=r"does not return the address.*MLG_GOLEM_REGISTRY"):
            await demand(models, MLG_GOLEM_REGISTRY=url)
        with pytest.raises(GolemUnavailable, match=r"does not return the file.*MLG_GOLEM_IMAGE"):
            await demand(models, MLG_GOLEM_IMAGE=f"{HASH}@{url}/image.gvmi")


@pytest.mark.parametrize(
    "text", [HASH, f"{HASH}@", f"{HASH[1:]}@http://a/b", f"{HASH}@ftp://a/b", f"{HASH}@http://a b"]
)
def test_an_image_setting_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"MLG_GOLEM_IMAGE=.*HASH@URL"):
        GolemSettings.from_env({"MLG_GOLEM_IMAGE": text})
