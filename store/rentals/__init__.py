"""Rented computers: who they are, and what they cost."""
