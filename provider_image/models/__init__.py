"""Models: the catalogue (data), installed artefacts, and the registry of both."""
