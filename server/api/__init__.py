"""The HTTP API: the views, their responses as JSON, and the API description."""
