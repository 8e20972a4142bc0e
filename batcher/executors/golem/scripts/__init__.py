"""The scripts that a worker sends to its provider, and what comes of them. Used by `worker.py`.

`attempt.py` describes a chunk that a provider has, and takes over its results; `commands.py` writes scripts of several
chunks; `failure.py` says what an exception of yapapi means.
"""
