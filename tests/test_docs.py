"""The papers, tested: every command and every setting stands in the README, and the other way round."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import click
import pytest

from batcher.settings import BatcherSettings
from mlg import cli
from provider_image.models.catalogue import CATALOGUE
from server.settings import ServerSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = [
    *(
        path
        for package in ("provider_image", "store", "server", "batcher", "cli", "mlg_client", "devnet")
        for path in sorted((ROOT / package).rglob("*.py"))
    ),
    ROOT / "mlg.py",
]
#: name -> default, as the settings table of the README says.
TABLE = dict(re.findall(r"^\| `(MLG_[A-Z_]+)` \| `?([^|`]+?)`? \|", README, re.MULTILINE))


def commands() -> Iterator[tuple[str, click.Command]]:
    """Walk over all commands of the command line."""

    def walk(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield path, command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                assert child is not None
                if not child.hidden:
                    yield from walk(f"{path} {name}", child)

    yield from walk("mlg", cli)


@pytest.mark.parametrize(
    ("path", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_command_has_help_with_an_example_and_stands_in_the_readme(path: str, command: click.Command) -> None:
    text = command.help or ""

    assert len(text) > 20, f"{path} has no help"
    assert path in re.sub(r"\s+", " ", README) or path.count(" ") > 1, f"{path} is not in the README"
    if not isinstance(command, click.Group):
        assert "xample" in text and "mlg " in text, f"{path} has no example"
        assert all(option.help for option in command.params if isinstance(option, click.Option) and not option.hidden)


def test_every_setting_in_the_code_is_in_the_readme_and_the_other_way_round() -> None:
    in_code = {name for path in SOURCES for name in re.findall(r"MLG_[A-Z]+(?:_[A-Z]+)*", path.read_text())}

    assert in_code == set(TABLE)


def test_the_defaults_in_the_readme_are_the_defaults_of_the_code() -> None:
    server, batcher = ServerSettings.from_env({}), BatcherSettings.from_env({})
    special = {"MLG_HOME", "MLG_WORKERS"}
    for settings in (server, batcher, batcher.golem):
        source = Path(__import__(type(settings).__module__, fromlist=["x"]).__file__ or "").read_text()
        for field, name in re.findall(r'(\w+)=(?:env\.\w+\(|_amount\(env,)\s*"(MLG_[A-Z_]+)"', source):
            if name not in special:
                value = getattr(settings, field)
                value = "none" if value is None else str(value) if isinstance(value, Decimal) else value
                said = TABLE[name]
                assert said == (value if isinstance(value, str) else f"{value:g}" if value < 1e6 else f"{value:.0f}"), (
                    name
                )


def test_every_setting_field_says_its_variable_and_its_default() -> None:
    for place in ("server/settings.py", "batcher/settings.py", "batcher/executors/golem/settings.py"):
        text = (ROOT / place).read_text()
        for name in set(re.findall(r'"(MLG_[A-Z_]+)"', text)) - {"MLG_HOME"}:
            assert re.search(rf"#: .*{name}\. Defaults to .*\.$", text, re.MULTILINE), name


def test_links_between_the_papers_lead_somewhere() -> None:
    for paper in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", paper.read_text()):
            assert target.startswith("http") or (paper.parent / target).exists(), f"{paper}: {target}"


def test_files_named_in_the_papers_exist() -> None:
    for paper in [ROOT / "README.md", ROOT / "docs/architecture.md", ROOT / "docs/golem.md"]:
        for name in re.findall(r"`((?:server|batcher|provider_image|scripts|tests)/[\w/.]+)`", paper.read_text()):
            assert (ROOT / name).exists(), f"{paper}: {name}"


def test_every_model_of_the_catalogue_stands_in_its_table() -> None:
    lines = (ROOT / "docs/models.md").read_text().splitlines()
    split = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    rows = {cells[0].strip("`"): cells for cells in split}

    for row in CATALOGUE.values():
        cells = rows[row.name]

        assert (cells[1], cells[2], cells[3]) == (row.title, f"{row.height} x {row.width}", row.preprocessing)
        assert row.weights is None or row.weights.file in cells[4]
    assert len(rows) == len(CATALOGUE) + 2  # the head and the line below it
