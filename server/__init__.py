"""The HTTP API and the store."""
