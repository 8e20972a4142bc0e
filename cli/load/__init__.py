"""The command `mlg load`, which sends images to a server at a chosen rate and reports how it answers."""
