"""Collections of images: members, their vectors, and what is similar to what."""
