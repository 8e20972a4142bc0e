"""The command line: one module for each command or group of `mlg`, and what the commands share.

Commands are loaded through the table in `mlg.py`. Heavy modules are imported in their functions, so that `--help` is
fast. Those that use the store directly, and not a server, work while no server runs.
"""
