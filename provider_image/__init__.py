"""What runs on a worker or provider, and what describes models and services.

The lowest package: every other may import it, and it imports none of them. Imports only the standard library until a
model is loaded, because it is copied alone, without `compiler/`, into the provider image.
"""
