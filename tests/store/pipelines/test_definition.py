"""How pipelines are written: what is refused, and with which words; references, conditions and the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from store.pipelines.definition import (
    MAX_FILE_BYTES,
    InvalidPipeline,
    MissingValue,
    Pipeline,
    look_up,
    parse_condition,
    parse_pipeline,
)
from store.pipelines.folder import PipelineFolder
from tests.pipelines import SPOTS, pipeline_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("models")
    with pipeline_models(folder):
        yield folder


def test_a_pipeline_is_the_same_after_it_was_stored(models: Path) -> None:
    pipeline = parse_pipeline("dots", SPOTS, models)

    stored = Pipeline.from_text(pipeline.to_text())

    assert stored == pipeline
    assert stored.to_text() == pipeline.to_text()
    assert list(pipeline.inputs()) == ["image"]


def test_a_step_runs_for_the_items_of_the_step_that_it_refers_to(models: Path) -> None:
    find, cut, embed = parse_pipeline("dots", SPOTS, models).steps

    assert (find.for_each, cut.for_each, embed.for_each) == (None, "find.spots", "find.spots")
    assert (cut.params, cut.references) == ({"angle": 3.0}, {"left": "each.box.left"})
    assert embed.inputs == {"image": "cut.image"}


def test_steps_are_sorted_by_what_they_need(models: Path) -> None:
    text = """
        [steps.last]
        model = "efficientnet_lite0"
        image = "first.image"
        [steps.first]
        model = "scissors"
    """

    assert [step.name for step in parse_pipeline("p", text, models).steps] == ["first", "last"]


ONE = '[steps.a]\nmodel = "scissors"\n'
TWO = f'{ONE}[steps.b]\nmodel = "efficientnet_lite0"\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("steps = 1 = 2", "no TOML"),
        ("title = 'x'", "1 to 16 steps"),
        ("titel = 'x'\n" + ONE, "unknown field 'titel'"),
        ("title = 7\n" + ONE, "title must be"),
        ("\n".join(f'[steps.s{n}]\nmodel = "scissors"' for n in range(17)), "1 to 16 steps"),
        ("#" * MAX_FILE_BYTES + "\n" + ONE, "more than 32768 bytes"),
        ("[steps.each]\nmodel = 'scissors'", "is not request or each"),
        ("[steps.Big]\nmodel = 'scissors'", "lower-case"),
        ("[steps.a]\nimage = 'request.image'", "needs a model"),
        ("[steps.a]\nmodel = 'efficientnet_lite9'", "Did you mean efficientnet_lite0"),
        (ONE + "foreach = 'b.x'", "unknown field 'foreach'"),
        (ONE + "image = 'b.image'", "names no step"),
        (ONE + "image = 'request'", "is no reference"),
        (ONE + "image = 'request.image.x'", "is no input"),
        (ONE + "params = { width = 3 }", "no parameter 'width'"),
        (ONE + "params = { left = -3 }", "left takes a number from 0 to 1000"),
        (ONE + "params = { mode = 'slow' }", "'slow' is no reference"),
        (ONE + "params = { left = 'request.image' }", "is an input"),
        (ONE + "params = 3", "params must be a table"),
        (ONE + "when = 3", "when must be"),
        (ONE + "when = 'b'", "is no condition"),
        (ONE + "when = 'each.score > 0.5'", "each needs for_each"),
        (ONE + "collection = 'mine'", "computes embeddings"),
        (ONE + "image = 'a.image'", "need each other"),
        ("[steps.a]\nmodel = 'scissors'\nimage = 'b.image'\n[steps.b]\nmodel = 'scissors'\nimage = 'a.image'", "a, b"),
        (TWO + "image = 'a.width'", "no file that step a returns. Files: a.image"),
        ("[steps.a]\nmodel = 'face_crop'\n[steps.b]\nmodel = 'quality'\nimage = 'a.image'", "is not for them"),
        (TWO + "when = 'a.height > 3'", "there is no 'height'. Fields: width"),
        (TWO + "for_each = 'a.width'", "needs a list"),
        (TWO + "for_each = 'request.image'", "needs a list"),
        (SPOTS + "[steps.more]\nmodel = 'scissors'\nfor_each = 'embed.x'", "itself runs for each"),
        (SPOTS + "[steps.more]\nmodel = 'scissors'\nfor_each = 'find.spots'\nimage = 'each.box'", "takes a file"),
        (SPOTS.replace("each.box.left", "each.box.lefd"), "no 'lefd'. Fields: left"),
        (
            SPOTS + "[steps.other]\nmodel = 'spot_finder'\n[steps.more]\nmodel = 'scissors'\nimage = 'cut.image'\n"
            "for_each = 'other.spots'",
            "different lists",
        ),
        (SPOTS.replace('model = "spot_finder"', "model = 'spot_finder'\nimage = 'cut.image'"), "need each other"),
    ],
)
def test_what_is_wrong_is_said(models: Path, text: str, reason: str) -> None:
    with pytest.raises(InvalidPipeline) as caught:
        parse_pipeline("p", text, models)

    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("condition", "value", "is_true"),
    [
        ("a.b >= 0.6", 0.6, True),
        ("a.b < 1", 2, False),
        ("a.b == 'x'", "x", True),
        ('a.b != "x"', "x", False),
        ("a.b in ['x', 'y']", "y", True),
        ("a.b not  in ['x', 'y']", "y", False),
        ("a.b in [1, 2]", 3, False),
    ],
)
def test_a_condition_compares(condition: str, value: Any, is_true: bool) -> None:
    assert parse_condition(condition).is_true(value) is is_true


@pytest.mark.parametrize(
    "condition",
    ["a.b", "a.b > ", "a.b in 3", "a.b > [1]", "a.b == 2026-11-20", "a.b > 1\nx = 2", "a.b == {x = 1}", "3 > a.b"],
)
def test_what_is_no_condition_is_refused(condition: str) -> None:
    with pytest.raises(InvalidPipeline):
        parse_condition(condition)


def test_values_that_cannot_be_compared_are_an_error() -> None:
    with pytest.raises(MissingValue, match="cannot be compared"):
        parse_condition("a.b > 0.5").is_true("high")


def test_a_value_is_looked_up_in_objects_lists_and_labels() -> None:
    labels = [["n1", "tabby", 0.7], ["n2", "lynx", 0.2]]

    assert look_up({"x": [{"y": 5}]}, "a.x.0.y") == 5
    assert (look_up(labels, "a.class"), look_up(labels, "a.score"), look_up(labels, "a.1.1")) == ("tabby", 0.7, "lynx")
    for missing in ("a.x.1", "a.z", "a.x.y", "a.x.0.y.z"):
        with pytest.raises(MissingValue):
            look_up({"x": [{"y": 5}]}, missing)


def test_a_file_of_the_home_takes_the_place_of_a_built_in_one(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipelines"
    folder.mkdir()
    (folder / "objects.toml").write_text(SPOTS)
    (folder / "my_dots.toml").write_text(SPOTS)
    (folder / "broken.toml").write_text("title = 'no steps'")
    (folder / "Bad-name.toml").write_text(SPOTS)
    (folder / "resnet50.toml").write_text(SPOTS)
    pipelines = PipelineFolder(tmp_path, models)

    found = {file.name: file for file in pipelines.list_files()}

    own = pipelines.find("objects")
    assert own is not None and own.title == "Spots"
    assert pipelines.find("My-Dots") is not None
    assert pipelines.find("nothing") is None
    assert [name for name, file in found.items() if file.pipeline is None] == ["Bad-name", "broken", "resnet50"]
    assert "there is a model with this name" in str(found["resnet50"].reason)
    assert "broken.toml: The file needs 1 to 16 steps" in str(found["broken"].reason)
    with pytest.raises(InvalidPipeline, match=r"broken\.toml"):
        pipelines.find("broken")


def test_every_built_in_pipeline_can_be_used(tmp_path: Path) -> None:
    found = PipelineFolder(tmp_path, tmp_path / "models").list_files()

    assert "objects" in [file.name for file in found]
    assert [file.reason for file in found if file.pipeline is None] == []
    assert all(file.is_built_in for file in found)
