"""The HTML pages for people with a browser, one module for each kind of thing that they show.

Each view module has `register(app, context)`; `server/app.py` calls them all. The pages read and change the same store
as the API and work without JavaScript. They may import from `server/api/`, which must not import anything from here.
"""

from __future__ import annotations

#: "module:function" of what is registered, in this order.
REGISTRY = (
    "server.pages.render:register",
    "server.pages.home:register",
    "server.pages.requests:register",
    "server.pages.batches:register",
    "server.pages.operator:register",
    "server.pages.api_reference:register",
    "server.pages.login:register",
)
