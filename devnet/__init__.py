"""A simulator of the Golem daemon (yagna) and its providers, for trying out and for tests.

It serves the part of the daemon's REST API that an unmodified yapapi uses. Its providers run what they receive as local
processes: it is no faster than this machine, and no money is involved. It imports only `provider_image`; of the product
only `cli/rentals/devnet.py` imports it. Needs aiohttp (extra `devnet`).
"""
