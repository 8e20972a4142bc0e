"""Tests whose program is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.programs import find_program


def test_a_program_is_found_by_the_first_of_its_names_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))

    assert find_program("no-such-program", Path(sys.executable).name, package="python3")


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_a_missing_program_skips_the_test_or_fails_it_in_ci(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)

    with pytest.raises(outcome, match="package nothing"):
        find_program("no-such-program", package="nothing")
