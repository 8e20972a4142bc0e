"""The commands that train and evaluate own models."""
