"""Who may call the HTTP API and how much: API keys, sessions, limits, and the guard that every request passes."""
