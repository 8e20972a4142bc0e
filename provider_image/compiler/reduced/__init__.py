"""Copies of a classifier that compute in bf16 or int8: how they are made, and how they are judged."""
