"""What the commands print of a training and of an evaluation, on 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from cli.tables import make_table, print_table, printable, width

#: Mistakes and left out examples that are printed; the files have all.
_MAX_LINES = 10
#: Widest name that is printed; a pipe has no width.
_MAX_NAME = 40


def percent(share: float | None) -> str:
    """Format a share; a dash if there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def headline(figures: Mapping[str, Any]) -> str:
    """Say in one line how good a model is."""
    count = figures.get("count") or 0
    if not count:
        return "no figures: too few different examples"
    if figures["kind"] == "regression":
        correlation = figures.get("pearson")
        more = "" if correlation is None else f", Pearson's correlation {correlation:.3f}"
        return f"mean absolute error {figures['mae']:.4g}, RMSE {figures['rmse']:.4g}{more}, on {count} examples"
    low, high = percent(figures["accuracy_low"]), percent(figures["accuracy_high"])
    return f"{percent(figures['accuracy'])} right of {count} (95 % interval: {low} to {high})"


def print_figures(figures: Mapping[str, Any]) -> None:
    """Print the figures of an evaluation, most important first."""
    if figures.get("basis"):
        click.echo(click.wrap_text(figures["basis"], min(width(), 80)))
    if figures.get("kind") == "classification" and figures.get("count"):
        table = make_table("class", "examples", "recall", "precision", right=("examples", "recall", "precision"))
        for one in figures["per_class"]:
            table.add_row(_short(one["name"]), str(one["count"]), percent(one["recall"]), percent(one["precision"]))
        click.echo()
        print_table(table)
    mistakes = figures.get("mistakes", ())
    if mistakes:
        _print_mistakes(figures["kind"], mistakes)
    left_out = figures.get("left_out", ())
    if left_out:
        click.echo(f"\n{figures['left_out_count']} examples were left out:")
        for one in left_out[:_MAX_LINES]:
            click.echo(f"  {_short(one['name'])}: {printable(one['reason'])}")


def _print_mistakes(kind: str, mistakes: Sequence[Mapping[str, Any]]) -> None:
    is_number = kind == "regression"
    click.echo(f"\n{'Largest errors' if is_number else 'Worst mistakes'}:")
    columns = ("example", "is", "answered") if is_number else ("example", "is", "answered", "probability")
    table = make_table(*columns, right=("probability",))
    for one in mistakes[:_MAX_LINES]:
        if is_number:
            table.add_row(_short(one["name"]), f"{one['true']:.6g}", f"{one['predicted']:.6g}")
        else:
            cells = (_short(one["name"]), _short(one["true"]), _short(one["predicted"]))
            table.add_row(*cells, percent(one["probability"]))
    print_table(table)


def _short(text: object) -> str:
    """Shorten a name to its end, which differs most."""
    name = printable(str(text))
    return name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}"
