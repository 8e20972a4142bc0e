"""A package outside of mlg that adds three services and a backend by entry points, see docs/contributing.md."""
