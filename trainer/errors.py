"""Errors of training. A class's docstring is its default message and tells the cure."""

from __future__ import annotations

from provider_image.errors import BadInput, ModelError


class UnusableExamples(BadInput):
    """The examples cannot be used. Send a folder for each class with at least five images in it."""


class TrainerMissing(ModelError):
    """Training needs scikit-learn. Install it: pip install "mlg[train]" """
