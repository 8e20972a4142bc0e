"""Benchmarks of the server and the store: uploads, lists, pages, retention, scale."""
