"""The batcher: plans chunks, dispatches them to executors, and records the results."""
