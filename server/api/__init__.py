"""The HTTP API: endpoints, their answers as JSON, and the description made from them."""
