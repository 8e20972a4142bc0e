"""`mlg pipelines`: lists, checks and draws."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import click.testing
import pytest

from cli.pipelines.pipelines import pipelines
from store.pipelines.definition import InvalidPipeline

CORRECT = "[steps.classify]\nmodel = 'efficientnet_lite0'\n\n[steps.embed]\nmodel = 'efficientnet_lite0_embedding'\n"
CONDITION = "when = 'classify.score >= 0.5'\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "both.toml").write_text(CORRECT + CONDITION)
    return tmp_path


def run(*arguments: str, home: Path) -> str:
    result = click.testing.CliRunner().invoke(pipelines, [*arguments, "--home", str(home)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_pipelines_are_listed_with_their_steps(home: Path) -> None:
    rows = [json.loads(line) for line in run("list", "--json", home=home).splitlines()]

    both = next(row for row in rows if row["name"] == "both")
    assert (both["is_built_in"], both["steps"], both["reason"]) == (False, ["classify", "embed"], None)
    assert "both" in run("list", home=home)


def test_a_check_names_the_step_and_the_mistake(home: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(CORRECT + "when = 'classify.colour == 1'\n")

    assert "both.toml: correct" in run("check", "both", home=home)
    result = click.testing.CliRunner().invoke(pipelines, ["check", str(wrong), "--home", str(home)])
    assert isinstance(result.exception, InvalidPipeline)
    assert "Step embed" in result.output
    with pytest.raises(InvalidPipeline, match="There is no pipeline"):
        run("check", "nothing", home=home)


def test_a_picture_is_well_formed_and_has_every_step(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.svg"

    run("picture", "both", "--out", str(out), home=home)

    texts = [element.text or "" for element in ElementTree.parse(out).iter() if element.tag.endswith("text")]
    assert {"request", "classify", "embed", "efficientnet_lite0"} <= set(texts)
    assert any("score &gt;=" in text or "score >=" in text for text in texts)
