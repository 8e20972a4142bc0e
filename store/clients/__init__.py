"""Clients: their API keys, their idempotency keys, and the webhooks that tell them of results."""
