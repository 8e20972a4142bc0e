"""Programs that some tests drive and that are not installed everywhere."""

from __future__ import annotations

import os
import shutil

import pytest


def find_program(*names: str, package: str) -> str:
    """Return the path of a program, by the first of its names that exists.

    Without one the test is skipped, or fails when CI=true.

    :param package: of Debian, which contains it.
    """
    found = next(filter(None, map(shutil.which, names)), None)
    if found is not None:
        return found
    reason = f"there is no {names[0]} here; it is in Debian's package {package}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
