"""A package outside of mlg that adds two services and a backend by entry points, as docs/contributing.md describes."""
