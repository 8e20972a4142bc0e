"""Authentication and limits: API keys, sessions, and the guard that checks every request."""
