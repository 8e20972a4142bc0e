"""Plans chunks, dispatches them and records what comes back."""
