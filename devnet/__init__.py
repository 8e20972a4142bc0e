"""A small Golem network on one desk: what the unmodified yapapi needs of a yagna daemon, and providers behind it.

For trying out and for tests; nothing else in the batcher imports it. Its providers run what they are sent as local
processes, so it is no faster than this machine, and nobody is paid.
"""
