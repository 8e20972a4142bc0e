"""Logging: one event is one line, with its ids at the end."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from cli.logs import OneLineFormatter, configure_logging
from provider_image.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_a_record_is_one_line_with_its_extras_even_with_a_traceback() -> None:
    record = logging.makeLogRecord(
        {"name": "batcher.cycle", "levelname": "ERROR", "msg": "chunk %s\nfailed", "args": ("7",), "chunk_id": "1a2b"}
    )
    try:
        raise ValueError("odd")
    except ValueError:
        record.exc_info = sys.exc_info()

    line = OneLineFormatter().format(record)

    assert "\n" not in line
    assert "ERROR batcher.cycle chunk 7\\nfailed chunk_id=1a2b" in line
    assert "ValueError: odd" in line


def test_a_record_has_nothing_that_a_terminal_obeys() -> None:
    record = logging.makeLogRecord(
        {"name": "a", "levelname": "WARNING", "msg": "It said \x1b]0;owned\x07.", "id": "\x9b2J"}
    )

    line = OneLineFormatter().format(record)

    assert line.isprintable() and line.endswith(r"It said \x1b]0;owned\x07. id=\x9b2J")


def test_events_of_the_configured_level_go_to_stderr() -> None:
    code = (
        "import logging; from cli.logs import configure_logging; configure_logging()\n"
        "logging.getLogger('a').info('quiet'); logging.getLogger('a').warning('loud')"
    )

    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"MLG_LOG_LEVEL": "warning"}, capture_output=True, text=True
    )

    assert result.stdout == ""
    assert [line.partition(" ")[2] for line in result.stderr.splitlines()] == ["WARNING a loud"]


def test_the_error_for_an_unknown_level_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="MLG_LOG_LEVEL"):
        configure_logging("chatty")
