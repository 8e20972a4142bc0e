"""Benchmarks of models and of what is learned, searched and painted with them."""
