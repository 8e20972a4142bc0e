"""The servers that `scripts/bench peers` compares with, each run in an environment of its own."""
