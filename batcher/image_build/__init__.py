"""Builds and publishes the provider's image."""
