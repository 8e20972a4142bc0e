"""The command `mlg pipelines`."""
