"""Commands that are clients of a server, beside `mlg submit`, and what clients have used."""
