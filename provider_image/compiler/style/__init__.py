"""Builders of the models that transfer styles: `texture.py` and `vgg19.py`, with the graph of `network.py`."""
