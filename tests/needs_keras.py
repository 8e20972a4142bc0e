"""Skips the tests of a module that imports this where tensorflow is not installed; with CI=true the import fails."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("tensorflow") is None:
    REASON = "tensorflow is not installed; there may be no release for this Python"
    if os.environ.get("CI") == "true":
        raise ImportError(REASON)
    pytest.skip(REASON, allow_module_level=True)
