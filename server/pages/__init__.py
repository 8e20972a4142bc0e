"""The HTML pages for people with a browser, one module for each kind of thing that they show.

Each view module has a subclass of `Views`, which `server/app.py` names. The pages read and change the same store as
the API and work without JavaScript. They may import from `server/api/`, which must not import anything from here.
"""
