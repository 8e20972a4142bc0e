"""Style transfer: what the backend `style` computes.

`texture.py` and `gradient.py` are the two methods, `optimising.py` is what both share, `pixels.py` has sizes and
colours of images.

Called by `provider_image/backends/style.py`; importing this package costs nothing.
"""
