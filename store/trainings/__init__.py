"""Trainings: models that are fitted to a client's own examples, from the examples to the installed model."""
