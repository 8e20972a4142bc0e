"""Faces in images: where they are, and how they are turned. Used by the services of faces."""
