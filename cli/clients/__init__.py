"""Commands that are clients of a server, beside `mlg submit`."""
