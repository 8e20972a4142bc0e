"""The command line: one module for each command or group of `mlg`, and what the commands share."""
