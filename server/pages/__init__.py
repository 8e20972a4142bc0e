"""The pages for people with a browser: templates, their style and their little JavaScript; see `render.py`."""
