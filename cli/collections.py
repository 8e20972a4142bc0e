"""The group `mlg collections`: collections of images on a server, searched by likeness.

It talks to the server only through `mlg_client`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_client
from cli.options import json_option, url_option, with_options
from cli.submission.files import find_files
from cli.tables import print_json_lines, print_records, printable

if TYPE_CHECKING:
    pass

name_argument = click.argument("name", metavar="NAME")
group_options = with_options(
    click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Most groups."),
    click.option("--images", type=click.IntRange(1, 1000), default=12, show_default=True, help="Most images of each."),
    url_option,
    json_option,
)


@click.group()
def collections() -> None:
    """Find similar images, near-duplicates and groups of images in collections.

    A collection has images, a vector of each, and labels. It is on a server and belongs to the API key that created it
    (MLG_API_KEY). An image can be found once its vector was computed, like any other answer.

    \b
    Example:
      mlg collections create holiday
      mlg collections add holiday photos/ --wait
      mlg collections search holiday beach.jpg
    """


@collections.command()
@name_argument
@click.option("--model", metavar="MODEL", help="Model whose vectors are compared. [efficientnet_lite0_embedding]")
@url_option
@json_option
def create(name: str, model: str | None, url: str | None, as_json: bool) -> None:
    """Create an empty collection.

    \b
    Example:
      mlg collections create holiday
    """
    with open_client(url) as client:
        _print([client.create_collection(name, model)], as_json)


@collections.command("list")
@url_option
@json_option
def list_collections(url: str | None, as_json: bool) -> None:
    """List the collections, newest first.

    Images are ready when they can be found, pending while their vector is being computed.

    \b
    Example:
      mlg collections list
    """
    with open_client(url) as client:
        _print(list(client.collections()), as_json)


@collections.command()
@name_argument
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE|DIR...]")
@click.option("--request", "ids", multiple=True, metavar="ID", help="Add the image of a request that is there already.")
@click.option("--label", "labels", multiple=True, metavar="NAME:VALUE", help="Label of all these images.")
@click.option("--wait", is_flag=True, help="Wait until the vectors are computed.")
@url_option
@json_option
def add(
    name: str,
    paths: Sequence[Path],
    ids: Sequence[str],
    labels: Sequence[str],
    wait: bool,
    url: str | None,
    as_json: bool,
) -> None:
    """Add images, folders of images, or images of requests that are there already.

    Each line on stdout is a file and its request id, separated by a tab. An image that is a member already is not added
    again. The exit status is 1 if an image was refused or, with --wait, has failed.

    \b
    Example:
      mlg collections add holiday photos/ --wait
      mlg collections add holiday --label place:Rome rome/
      mlg requests list --json | jq -r .req_id | xargs -I ID mlg collections add holiday --request ID
    """
    given = _parse_labels(labels)
    if not paths and not ids:
        raise click.UsageError("Give files, folders or --request ID.")
    files = find_files(paths) if paths else []
    failed = False
    with open_client(url) as client:
        if ids:
            for item in client.add_requests_to_collection(name, ids, labels=given):
                failed |= item["req_id"] is None
                _print_added(item["client_id"], item["req_id"], item["reason"], as_json)
        if files:
            batch = client.add_to_collection(name, files, labels=given)
            for file, outcome in zip(files, batch.outcomes, strict=True):
                id = getattr(outcome, "id", None)
                failed |= id is None
                _print_added(str(file), id, outcome.reason, as_json)
            for request in client.as_completed(batch.requests) if wait else ():
                if request.status != "done":
                    failed = True
                    click.echo(f"mlg: {printable(request.name or request.id)}: {request.reason}", err=True)
    if failed:
        raise click.exceptions.Exit(1)


@collections.command()
@name_argument
@click.argument("image", required=False, type=click.Path(path_type=Path, dir_okay=False), metavar="[IMAGE]")
@click.option("--request", "id", metavar="ID", help="Search by the image of a request.")
@click.option("-k", type=click.IntRange(1, 1000), default=10, show_default=True, help="How many images at most.")
@click.option("--threshold", type=click.FloatRange(-1, 1), metavar="SCORE", help="Least similarity, -1 to 1.")
@click.option("--label", "labels", multiple=True, metavar="[NAME:]VALUE", help="Only images with this label.")
@url_option
@json_option
def search(
    name: str,
    image: Path | None,
    id: str | None,
    k: int,
    threshold: float | None,
    labels: Sequence[str],
    url: str | None,
    as_json: bool,
) -> None:
    """Find the images that are most similar to an image, or to that of a request.

    The score is the cosine of the angle between two vectors; 1 is the same image.

    \b
    Example:
      mlg collections search holiday beach.jpg -k 5
      mlg collections search holiday --request 019a3c5e77b2c4f0a1d2e3f4a5b6c7d8 --label place:Rome
    """
    if (image is None) == (id is None):
        raise click.UsageError("Give an image, or --request ID.")
    with open_client(url) as client:
        found = client.search_collection(name, image, request=id, k=k, threshold=threshold, labels=labels)
    if as_json:
        print_json_lines(found)
        return
    print_records(
        found,
        {
            "score": lambda match: f"{match['score']:.4f}",
            "id": lambda match: match["req_id"],
            "name": lambda match: match["name"],
            "labels": _format_labels,
        },
        right=("score",),
    )


@collections.command()
@name_argument
@click.option(
    "--threshold",
    type=click.FloatRange(-1, 1),
    default=0.95,
    show_default=True,
    metavar="SCORE",
    help="Similarity from which on two images belong together.",
)
@group_options
def duplicates(name: str, threshold: float, limit: int, images: int, url: str | None, as_json: bool) -> None:
    """Find near-duplicates: groups of images that similarities of at least the threshold connect.

    \b
    Example:
      mlg collections duplicates holiday --threshold 0.98
    """
    with open_client(url) as client:
        _print_groups(client.collection_duplicates(name, threshold=threshold, limit=limit, images=images), as_json)


@collections.command("group")
@name_argument
@click.option("--count", type=click.IntRange(1, 200), metavar="N", help="How many groups. [by the number of images]")
@group_options
def group_images(name: str, count: int | None, limit: int, images: int, url: str | None, as_json: bool) -> None:
    """Divide the images into groups by likeness. The same images give the same groups.

    \b
    Example:
      mlg collections group holiday --count 8
    """
    with open_client(url) as client:
        _print_groups(client.collection_groups(name, count=count, limit=limit, images=images), as_json)


@collections.command()
@name_argument
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@url_option
def remove(name: str, ids: Sequence[str], url: str | None) -> None:
    """Remove the images of requests from a collection. The requests stay.

    \b
    Example:
      mlg collections remove holiday 019a3c5e77b2c4f0a1d2e3f4a5b6c7d8
    """
    with open_client(url) as client:
        for id in ids:
            client.remove_from_collection(name, id)
            click.echo(f"{id}\tremoved")


@collections.command()
@name_argument
@url_option
def delete(name: str, url: str | None) -> None:
    """Delete a collection. Its requests stay, and are deleted when they are old enough.

    \b
    Example:
      mlg collections delete holiday
    """
    with open_client(url) as client:
        client.delete_collection(name)
    click.echo(f"{printable(name)}\tdeleted")


def _parse_labels(texts: Sequence[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for text in texts:
        label, colon, value = text.partition(":")
        if not colon or label in labels:
            raise click.BadParameter("takes NAME:VALUE, each name once.", param_hint="--label")
        labels[label] = value
    return labels


def _print(found: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json_lines(found)
        return
    print_records(
        found,
        {
            "name": lambda collection: collection["name"],
            "model": lambda collection: collection["model"],
            "ready": lambda collection: collection["counts"]["ready"],
            "pending": lambda collection: collection["counts"]["pending"],
            "failed": lambda collection: collection["counts"]["failed"],
            "created": lambda collection: collection["created_at"],
        },
        right=("ready", "pending", "failed"),
    )


def _print_added(what: str, id: str | None, reason: str | None, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"image": what, "req_id": id, "reason": reason}))
    elif id is not None:
        click.echo(f"{printable(what)}\t{id}")
    else:
        click.echo(f"mlg: {printable(what)}: {reason}", err=True)


def _print_groups(answer: Mapping[str, Any], as_json: bool) -> None:
    groups = answer["groups"]
    if as_json:
        print_json_lines(groups)
        return
    for number, group in enumerate(groups, start=1):
        click.echo(f"{number}. {group['size']} images{', ' + printable(group['label']) if group['label'] else ''}")
        for image in group["images"]:
            click.echo(f"   {image['score']:.4f}  {image['req_id']}  {printable(image['name'] or '')}")
    click.echo(f"{answer['total']} groups", err=True)


def _format_labels(image: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}:{value}" for name, value in image["labels"].items())
