"""The documentation is true: commands, options, settings, endpoints, files and links exist, and examples work."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
import pytest

from batcher.executors import REGISTRY
from batcher.executors.fallback import FallbackSettings
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.local import LocalSettings
from batcher.settings import BatcherSettings
from mlg import cli
from provider_image.models.catalogue import CATALOGUE
from scripts import generate_docs
from scripts.benchmarks.registry import RUNS, import_benchmark
from server.settings import ServerSettings
from telegram_bot.settings import TelegramSettings
from tests.programs import find_program
from tests.system import System
from tests.timing import DEADLINE_SECONDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: The changelog speaks of files and commands as they were, so only its links are checked.
LINKING_PAGES = [*PAGES, ROOT / "CHANGELOG.md"]
SOURCES = [
    *(path for package in generate_docs.PACKAGES for path in sorted((ROOT / package).rglob("*.py"))),
    *sorted(ROOT.glob("mlg*.py")),
]
#: Ends a command on a line of shell.
OPERATORS = {"|", "||", "&", "&&", ";", "(", ")", "<", ">", ">>"}


def name_of(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else value if isinstance(value, str) else ""


def test_generated_parts_are_up_to_date() -> None:
    stale = [name_of(path) for path in generate_docs.stale()]

    assert stale == [], "run scripts/generate_docs"


@pytest.mark.parametrize(("path", "command"), list(generate_docs.commands()), ids=name_of)
def test_a_command_has_help_with_an_example(path: str, command: click.Command) -> None:
    text = command.help or ""

    assert len(text) > 20, f"{path} has no help"
    if not isinstance(command, click.Group):
        assert "xample" in text and "mlg " in text, f"{path} has no example"
        assert all(option.help for option in command.params if isinstance(option, click.Option) and not option.hidden)


def shell_lines(text: str) -> Iterator[str]:
    """Find what a reader would copy into a shell: the lines of blocks marked sh, and code in the text."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for language, block in fence.findall(text):
        if language == "sh":
            yield from block.replace("\\\n", " ").splitlines()
    for span in re.findall(r"`([^`\n]+)`", fence.sub("", text)):
        if re.match(r"(?:[A-Z_]+=\S+ )*(?:mlg|mlg-provider|\.venv/bin/mlg|scripts/\w+) ", span):
            yield span


def simple_commands(line: str) -> Iterator[list[str]]:
    """Split a line of shell into commands, without the variables that are set in front of them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.wordchars += "$@:{}[],!%^"
    words: list[str] = []
    for token in [*lexer, ";"]:
        if token not in OPERATORS:
            words.append(token)
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words
        words = []


def check_mlg(words: list[str]) -> None:
    """Find a command and its options in the command line's own tables."""
    command: click.Command = cli
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-") and rest[0].islower():
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, f"there is no command {' '.join(words)!r}"
        command, rest = found, rest[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert set(options_in(rest)) <= known, f"{' '.join(words)!r} has an option that does not exist"


@functools.cache
def provider_help(command: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "provider_image", command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def check_provider(words: list[str]) -> None:
    assert all(re.search(rf"{option}\b", provider_help(words[1])) for option in options_in(words[2:])), words


def check_script(words: list[str]) -> None:
    """Find a script, and what is said to it in its own text."""
    script = ROOT / words[0]
    assert os.access(script, os.X_OK), f"there is no {words[0]}"
    arguments = words[1:]
    if script.name == "setup":
        extras = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2]
        assert all(re.search(rf"^{extra} =", extras, re.MULTILINE) for extra in arguments), words
    elif script.name == "bench":
        for name in arguments[:1]:
            assert name in ("all", *RUNS), words
            module = importlib.import_module("scripts.benchmarks.all") if name == "all" else import_benchmark(name)
            command = module.main
            known = {option for parameter in command.params for option in parameter.opts}
            assert set(options_in(arguments)) <= known, words
    elif script.name != "test":
        assert all(re.search(rf"{option}\b", script.read_text()) for option in options_in(arguments)), words


def options_in(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_in_the_documentation_exist(page: Path) -> None:
    for line in shell_lines(page.read_text()):
        for words in simple_commands(line):
            if words[0] in ("mlg", ".venv/bin/mlg", "/opt/mlg/bin/mlg"):
                check_mlg(words)
            elif words[0] == "mlg-provider" and len(words) > 1:
                check_provider(words)
            elif words[0].startswith("scripts/"):
                check_script(words)


def test_every_command_is_in_the_table_of_commands() -> None:
    table = set(re.findall(r"^\| `mlg ([\w-]+)` \|", (ROOT / "docs/commands.md").read_text(), re.MULTILINE))

    assert table == set(cli.list_commands(click.Context(cli)))


def test_every_setting_in_the_code_is_documented_and_the_other_way_round() -> None:
    in_code = {name for path in SOURCES for name in re.findall(r"MLG_[A-Z]+(?:_[A-Z]+)*", path.read_text())}
    documented = set(re.findall(r"^\| `(MLG_[A-Z_]+)` \|", (ROOT / "docs/settings.md").read_text(), re.MULTILINE))

    assert in_code == documented


def test_documented_defaults_are_those_of_the_code() -> None:
    documented = {one.name: one.default.split(" ")[0] for rows in generate_docs.settings().values() for one in rows}
    # Those depend on the machine, or are in a table that is written by hand.
    special = {"MLG_HOME", "MLG_WORKERS", "MLG_URL", "MLG_API_KEY"}
    servers: list[Any] = [ServerSettings, BatcherSettings, FallbackSettings, LocalSettings, GolemSettings]
    records = [*servers, TelegramSettings]
    checked = set()
    for settings in (record.from_env({}) for record in records):
        for field in fields(settings):
            name = field.metadata["variable"]
            if name.startswith("MLG_") and name not in special:
                value: Any = getattr(settings, field.name)
                value = "none" if value in (None, frozenset()) else str(value) if isinstance(value, Decimal) else value
                shown = value if isinstance(value, str) else f"{value:g}" if value < 1e6 else f"{value:.0f}"
                assert documented[name] == shown, name
                checked.add(name)
    assert len(checked) > 40


def test_every_field_of_the_settings_names_its_variable_and_its_default() -> None:
    documented = {one.name for rows in generate_docs.settings().values() for one in rows}
    for path in (ROOT / "server/settings.py", *(ROOT / "batcher").rglob("*.py")):
        read = set(re.findall(r'"(MLG_[A-Z_]+)"', path.read_text()))

        assert read <= documented, path


def test_every_executor_of_the_registry_has_a_table_of_its_settings() -> None:
    assert {name.capitalize() for name in REGISTRY} <= set(generate_docs.headings().values())


def anchors_of(page: Path) -> set[str]:
    """List the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING_PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors_of(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_in_the_documentation_exist(page: Path) -> None:
    folders = (*generate_docs.PACKAGES, "scripts", "tests", "docs", "deploy", "examples")
    in_folders = re.findall(rf"`((?:{'|'.join(folders)})/[\w/.-]*)`", page.read_text())
    at_top = re.findall(r"`([\w-]+\.(?:py|cfg|toml|md)|constraints\.txt|Dockerfile|LICENSE)`", page.read_text())

    missing = [name for name in [*in_folders, *at_top] if not (ROOT / name).exists()]

    assert missing == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)", README))

    assert {name_of(page) for page in LINKING_PAGES if page.name not in ("README.md", "CONTRIBUTING.md")} <= linked


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


def test_the_commit_rule_is_written_down() -> None:
    assert "at most 72 characters" in (ROOT / "CONTRIBUTING.md").read_text()


def test_every_model_of_the_catalogue_is_in_its_table() -> None:
    lines = (ROOT / "docs/models.md").read_text().partition("\n## ")[0].splitlines()
    split = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    rows = {cells[0].strip("`"): cells for cells in split}

    models = [row for row in CATALOGUE.values() if row.base is None]
    for row in models:
        cells = rows[row.name]

        if not row.features:  # those of other services are in a table of their own
            assert cells[1] == row.title and row.service != "classification"
            continue
        assert (cells[1], cells[2], cells[3]) == (row.title, f"{row.height} x {row.width}", row.preprocessing)
        assert row.weights is None or row.weights.file in cells[4]
        assert cells[8] == str(row.features)
    assert len(rows) == len(models) + 2  # the head and the line below it


@pytest.fixture
def served(tmp_path: Path, models_folder: Path) -> Iterator[str]:
    """A whole system, started with the README's command on a free port; its address."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(models_folder)
    assert "\n.venv/bin/mlg up\n" in README
    system = System(home)
    yield system.base
    system.stop()


def test_the_curl_lines_of_the_readme_get_the_answers_that_it_shows(
    served: str, photos: dict[str, bytes], tmp_path: Path
) -> None:
    find_program("curl", package="curl")
    lines = [line for line in shell_lines(README) if line.startswith("curl ")]
    shown = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]
    (tmp_path / "kitten.jpg").write_bytes(photos["chelsea"])

    answers: list[dict[str, Any]] = []
    for line in lines:
        command = line.replace("http://127.0.0.1:5000", served)
        if answers:
            command = command.replace("REQ_ID", answers[0]["req_id"])
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            capture_output=True,
            check=True,
            timeout=DEADLINE_SECONDS,
            env={**os.environ, "no_proxy": "127.0.0.1"},
        )
        answers.append(json.loads(done.stdout))

    assert len(lines) == 3
    assert [set(answer) for answer in answers[:2]] == [set(answer) for answer in shown]
    assert answers[0]["status"] == shown[0]["status"] == "queued"
    assert [row[:2] for row in answers[1]["preds"][:3]] == [row[:2] for row in shown[1]["preds"][:3]]
    assert answers[1]["preds"][0][2] == pytest.approx(shown[1]["preds"][0][2], abs=0.05)
    assert answers[2]["preds"] == answers[1]["preds"][:1]
