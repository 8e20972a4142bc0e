"""The command line: every command of `mlg`, one file a group, and what commands share."""
