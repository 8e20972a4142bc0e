"""Benchmarks of the way of an image to its answer: chunks, workers, providers, other servers."""
