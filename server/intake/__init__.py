"""How images come in: bodies are read, parsed, fetched, checked and staged; `accept.py` is the entry point."""
