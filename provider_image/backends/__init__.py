"""Backends: each loads artefacts of one kind and runs them."""
