"""Builders of models that are methods of OpenCV and have no weights."""
