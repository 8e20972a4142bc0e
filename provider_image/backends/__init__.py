"""Backends: each loads an artefact and runs it."""
