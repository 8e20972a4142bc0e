"""The command `mlg train`: sends examples to a server, waits for the model, and prints how good it is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_client
from cli.options import file_option, json_option, url_option
from cli.training.shown import headline, print_figures
from provider_image.errors import MlgError

if TYPE_CHECKING:
    from mlg_client import Client

#: Seconds between two looks at a training.
_POLL_SECONDS = 0.5
_FINAL = ("done", "failed", "cancelled")

target_option = click.option(
    "--target",
    metavar="COLUMN",
    help="Column of the CSV file with what is learned: the number of each image, or a class or number of a table.",
)
label_option = click.option(
    "--label",
    metavar="COLUMN",
    help="Column of the CSV file, or label of a collection's images, with the class. [default: label or class]",
)


@click.command()
@click.argument("name")
@click.argument("source", required=False, type=click.Path(path_type=Path), metavar="[FOLDER|ZIP|CSV]")
@click.option(
    "--collection",
    metavar="COLLECTION",
    help="Train on the images of this collection and their labels, without SOURCE.",
)
@target_option
@label_option
@click.option("--text", metavar="COLUMN", help="Learn from the texts in this column of the CSV file.")
@click.option(
    "--segmenter",
    type=click.Choice(["characters", "jieba"]),
    help="With --text: what finds words in languages without blanks between them. [default: characters]",
)
@click.option("--backbone", metavar="MODEL", help="Model whose features are used. [default: efficientnet_lite0]")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="Decides which examples are held out for the figures.",
)
@file_option("--out", "Write the confusion matrix, all answers and the mistakes to this folder.", metavar="DIR")
@click.option("--no-wait", is_flag=True, help="Print the id of the training and do not wait for it.")
@url_option
@json_option
def train(
    name: str,
    source: Path | None,
    collection: str | None,
    target: str | None,
    label: str | None,
    text: str | None,
    segmenter: str | None,
    backbone: str | None,
    seed: int,
    out: Path | None,
    no_wait: bool,
    url: str | None,
    as_json: bool,
) -> None:
    """Train your own model on images, on a table or on texts, and serve it as NAME.

    FOLDER or ZIP has a folder for each class, with at least five images in each; with twenty or more the figures are
    better. A CSV file that names images has their classes or, with --target, numbers. A CSV file without images is a
    table, of which the column --target is learned from the others, or with --text from one with texts.

    The features of images are computed like any other request, so a server and a batcher must run. Training again under
    the same name keeps the earlier model; see `mlg models versions`.

    \b
    Example:
      mlg train my_pets photos/
      mlg train my_pets pets.zip --out figures/ --seed 1
      mlg train beauty scores.csv --target score
      mlg train rating lectures.csv --target stars
      mlg train mood reviews.csv --text review --target mood
      mlg train places --collection holiday --label place
    """
    from cli.training.archive import read_archive

    if (source is None) == (collection is None):
        raise click.UsageError("Give either FOLDER, ZIP or CSV, or --collection COLLECTION.")
    data = None if source is None else read_archive(source, target=target, label=label)
    options = {
        **{"target": target, "label": label, "text": text, "segmenter": segmenter, "collection": collection},
        **{"backbone": backbone, "seed": seed},
    }
    given = {option: value for option, value in options.items() if value is not None}
    with open_client(url) as client:
        sent = client.train(data, name, params=given)
        for item in sent["items"]:
            click.echo(f"mlg: left out: {item['client_id']}: {item['reason']}", err=True)
        if no_wait:
            click.echo(json.dumps(sent) if as_json else sent["training_id"])
            return
        try:
            training = wait_for_training(client, sent["training_id"])
        except KeyboardInterrupt:
            click.echo(f"\nmlg: The training goes on: {client.url}/ui/train/{sent['training_id']}", err=True)
            raise
        files = _write_files(client, training, out)
    if as_json:
        click.echo(json.dumps(training))
    if training["state"] != "done":
        raise MlgError(training.get("reason") or "The training was cancelled.")
    if not as_json:
        _print_training(training, files)


def wait_for_training(client: Client, id: str) -> Mapping[str, Any]:
    """Wait until a training has ended; show on stderr what is done meanwhile. :raises ClientError:"""
    said = ""
    while True:
        training = client.training(id)
        if training["state"] in _FINAL:
            if said and sys.stderr.isatty():
                click.echo(err=True)
            return training
        now = _progress_line(training)
        if now != said:
            if sys.stderr.isatty():
                click.echo(f"\r{now:<79}", err=True, nl=False)
            elif now.partition(":")[0] != said.partition(":")[0]:
                click.echo(now, err=True)
            said = now
        time.sleep(_POLL_SECONDS)


def _progress_line(training: Mapping[str, Any]) -> str:
    features = training.get("features")
    if training["state"] == "waiting_for_features" and features is not None:
        ended = features["done"] + features["failed"] + features["cancelled"] + features["expired"]
        is_blocked = not features["claimed"] and ended < training["examples"]
        why = f" {training['waiting_for']}" if is_blocked and "no batcher" in training.get("waiting_for", "") else ""
        return f"computing features: {ended} of {training['examples']}{why}"
    return str(training.get("step") or training.get("waiting_for") or "fitting")


def _write_files(client: Client, training: Mapping[str, Any], out: Path | None) -> list[str]:
    """Write the files of a training to a folder. :return: where the files are."""
    if out is None:
        return [f"{client.url}{file['url']}" for file in training["files"].values()]
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in training["files"]:
            path = out / Path(name).name
            path.write_bytes(client.training_file(training["training_id"], name))
            written.append(str(path))
    except OSError as error:
        raise MlgError(f"{out} cannot be written: {error.strerror}.") from error
    return written


def _print_training(training: Mapping[str, Any], files: list[str]) -> None:
    figures, name = training["figures"], training["name"]
    click.echo(f"{name}, version {training['version']}: {headline(figures)}")
    print_figures(figures)
    click.echo("\nFiles:")
    for file in files:
        click.echo(f"  {file}")
    if training["kind"] == "images":
        click.echo(f"\nAsk it: mlg submit --model {name} --wait photo.jpg")
    else:
        input_name = {"table": "row", "text": "text"}[training["kind"]]
        click.echo(f"\nAsk it: POST /requestPrediction/{name} with JSON that has the field `{input_name}`")
    if training["version"] > 1:
        click.echo(f"Go back: mlg models use {name}@{training['version'] - 1}")
