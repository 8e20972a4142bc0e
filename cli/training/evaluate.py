"""The command `mlg evaluate`: asks a model on examples whose answers are known, and prints how good it is."""

from __future__ import annotations

import csv
import io
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.open_store import open_client
from cli.options import file_option, json_option, url_option
from cli.tables import make_table, print_table
from cli.training.archive import names_images
from cli.training.shown import headline, percent, print_figures
from cli.training.train import label_option, target_option
from provider_image.errors import MlgError
from server.csv_cells import to_cell
from trainer.errors import UnusableExamples
from trainer.examples import (
    Example,
    ExampleLimits,
    ExampleSet,
    SkippedExample,
    parse_number,
    read_csv,
    read_examples,
)

if TYPE_CHECKING:
    from mlg_client import Client, Refused, Request
    from trainer.figures import Comparison, Figures

#: Rows of an answer; a classifier with more classes says nothing of the others.
_MAX_ANSWERS = 20
#: One image of each class says something about a model that is there already.
_LIMITS = ExampleLimits(min_of_class=1, min_with_number=1)


@click.command()
@click.argument("name", metavar="MODEL")
@click.argument("source", type=click.Path(path_type=Path), metavar="FOLDER|ZIP|CSV")
@click.option("--with", "other", metavar="MODEL", help="Ask another model too, and compare both.")
@target_option
@label_option
@click.option("--text", metavar="COLUMN", help="Column of the CSV file with the texts to ask about.")
@file_option("--csv", "Write the answer to each image to this file.")
@url_option
@json_option
def evaluate(
    name: str,
    source: Path,
    other: str | None,
    target: str | None,
    label: str | None,
    text: str | None,
    csv: Path | None,
    url: str | None,
    as_json: bool,
) -> None:
    """Ask a model on other examples whose answers are known, and print how good it is.

    FOLDER, ZIP and CSV are those of `mlg train`. The examples are sent like any others, so the answers come from
    wherever the server computes.

    \b
    Example:
      mlg evaluate my_pets other-photos/
      mlg evaluate my_pets other-photos/ --with efficientnet_lite0 --csv answers.csv
      mlg evaluate beauty scores.csv --target score
    """
    from trainer.figures import compare_figures

    with tempfile.TemporaryDirectory() as work:
        if source.suffix.lower() == ".csv" and source.is_file() and not names_images(source):
            found = _read_table(source, target, text)
        else:
            found = read_examples(source, Path(work), target=target, label=label, limits=_LIMITS)
        for skipped in found.skipped:
            click.echo(f"mlg: left out: {skipped.name}: {skipped.reason}", err=True)
        with open_client(url) as client:
            figures = [_ask(client, model, found) for model in (name, *([other] if other else []))]
    comparison = compare_figures(*figures) if other else None
    if csv is not None:
        _write_csv(csv, (comparison or figures[0]).rows())
    if as_json:
        models = {model: one.as_json() for model, one in zip((name, other), figures, strict=False)}
        click.echo(json.dumps({"models": models, "comparison": comparison and comparison.as_json()}))
    elif comparison is not None and other is not None:
        _print_comparison((name, other), figures, comparison)
    else:
        click.echo(f"{name}: {headline(figures[0].as_json())}")
        print_figures(figures[0].as_json())


def _ask(client: Client, model: str, found: ExampleSet) -> Figures:
    """Ask a model on all examples. :raises UnusableExamples: none was answered. :raises ClientError:"""
    from mlg_client import Request
    from trainer.figures import regression_figures

    examples = found.examples
    outcomes: Sequence[Request | Refused]
    if examples and isinstance(examples[0], _Row):
        outcomes = [_submit_row(client, one, model) for one in examples if isinstance(one, _Row)]
    else:
        names = [one.name for one in examples]
        outcomes = client.submit_many((_read(one) for one in examples), model, names=names).outcomes
    requests = {one.id: one for one in outcomes if isinstance(one, Request)}
    said = 0
    for said, ended in enumerate(client.as_completed(requests.values(), top=_MAX_ANSWERS), 1):
        requests[ended.id] = ended
        if sys.stderr.isatty():
            click.echo(f"\r{model}: {said} of {len(requests)} answered", err=True, nl=False)
    if said and sys.stderr.isatty():
        click.echo(err=True)
    answered: list[tuple[Example, Request]] = []
    for example, outcome in zip(examples, outcomes, strict=True):
        request = requests.get(outcome.id) if isinstance(outcome, Request) else None
        if request is not None and request.status == "done":
            answered.append((example, request))
        else:
            reason = outcome.reason if request is None else request.reason or request.status
            click.echo(f"mlg: left out: {example.name}: {reason}", err=True)
    if not answered:
        raise UnusableExamples(f"{model} has answered none of the images.")
    names = [example.name for example, _ in answered]
    basis = f"{len(answered)} examples that were sent to {model}"
    if answered[0][0].target is not None:
        numbers = [_number(request, model) for _, request in answered]
        return regression_figures([one.target or 0.0 for one, _ in answered], numbers, names, basis=basis)
    return _class_figures(answered, names, model, basis)


@dataclass(frozen=True, kw_only=True)
class _Row(Example):
    """A row of a table, or a text, to ask a model about."""

    #: Name of the input -> what is sent.
    inputs: Mapping[str, Any]


def _read_table(table: Path, target: str | None, text: str | None) -> ExampleSet:
    """Read the rows of a table. Those whose target is a number are asked for numbers. :raises UnusableExamples:"""
    if target is None:
        raise UnusableExamples("A table needs --target COLUMN, with the answers that are right.")
    rows = list(read_csv(table, _LIMITS))
    for column in (target, *([text] if text else [])):
        if column not in rows[0]:
            raise UnusableExamples(f"The table has no column {column!r}. It has: {', '.join(rows[0])[:300]}.")
    examples, skipped, given = [], [], [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    is_number = all(_is_number(row[target]) for row in given if row[target].strip())
    for number, row in enumerate(given, 2):
        value, name = row.pop(target).strip(), f"row {number}"
        if not value:
            skipped.append(SkippedExample(name=name, reason=f"It has no value in the column {target}."))
            continue
        inputs = {"text": row[text].encode()} if text else {"row": {key: cell or None for key, cell in row.items()}}
        facts: dict[str, Any] = {"target": float(value)} if is_number else {"label": value}
        examples.append(_Row(name=name, data=b"", inputs=inputs, **facts))
    return ExampleSet(examples=tuple(examples), skipped=tuple(skipped))


def _is_number(text: str) -> bool:
    try:
        parse_number(text.strip())
    except UnusableExamples:
        return False
    return True


def _submit_row(client: Client, row: _Row, model: str) -> Request | Refused:
    from mlg_client import Refused

    try:
        return client.submit(row.inputs, model, name=row.name)
    except Refused as error:
        if error.status == 404:
            raise
        return error


def _class_figures(answered: Sequence[tuple[Example, Request]], names: list[str], model: str, basis: str) -> Figures:
    import numpy as np

    from trainer.figures import classification_figures

    shares = [_shares(request, model) for _, request in answered]
    said = {name for one in shares for name in one}
    true = [example.label or "" for example, _ in answered]
    # A classifier with more classes than an answer has rows may have those that it never named.
    is_whole = all(len(one) < _MAX_ANSWERS for one in shares)
    classes = sorted(said if is_whole else said.union(true))
    probabilities = np.array([[one.get(name, 0.0) for name in classes] for one in shares])
    return classification_figures(classes, true, probabilities, names, basis=basis)


def _shares(request: Request, model: str) -> dict[str, float]:
    """Return class -> probability of an answer. :raises UnusableExamples: it is none of a classifier."""
    rows = request.preds.get("labels") if isinstance(request.preds, dict) else request.preds
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) >= 2 for row in rows):
        raise UnusableExamples(
            f"{model} is no classifier. Give --target COLUMN with numbers for one that answers those."
        )
    return {str(row[-2]): float(row[-1]) for row in rows}


def _number(request: Request, model: str) -> float:
    value: Any = request.preds.get("value") if isinstance(request.preds, dict) else None
    if not isinstance(value, int | float):
        raise UnusableExamples(f"{model} does not answer a number.")
    return float(value)


def _read(example: Example) -> bytes:
    return example.data if isinstance(example.data, bytes) else example.data.read_bytes()


def _write_csv(path: Path, rows: Any) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([to_cell(cell) for cell in row] for row in rows)
    try:
        path.write_text(text.getvalue(), encoding="utf-8")
    except OSError as error:
        raise MlgError(f"{path} cannot be written: {error.strerror}.") from error


def _print_comparison(models: tuple[str, str], figures: Sequence[Figures], comparison: Comparison) -> None:
    for model, one in zip(models, figures, strict=True):
        click.echo(f"{model}: {headline(one.as_json())}")
    click.echo(
        f"{models[0]} is better on {comparison.first_better} examples, {models[1]} on {comparison.second_better}, "
        f"{comparison.equal} are equal."
    )
    if comparison.p_value is not None:
        click.echo(f"So large a difference by chance, if both were equally good: p = {comparison.p_value:.3g}")
    first, second = figures
    if first.kind == "classification":
        table = make_table("class", "examples", f"recall {models[0]}", f"recall {models[1]}", right=("examples",))
        recalls = {one.name: one.recall for one in second.per_class}
        for row in first.per_class:
            if row.count:
                table.add_row(row.name, str(row.count), percent(row.recall), percent(recalls.get(row.name)))
        click.echo()
        print_table(table)
