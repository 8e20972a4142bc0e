"""What runs on a provider: chunk files in, results files out.

Imports only the standard library until a model is loaded, because this folder is copied alone into a container.
"""
