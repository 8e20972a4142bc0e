"""Builds and publishes the provider image."""
