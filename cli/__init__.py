"""The command line: the commands of `mlg`, one file a group. Above all other packages; only `mlg.py` imports it."""
