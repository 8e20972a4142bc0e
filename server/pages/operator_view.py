"""The operator's page: the dashboard's figures, with the forms of the controls in `server/api/views/operator.py`."""

from __future__ import annotations

import flask

from server.api.views.operator import PAGE_PATH
from server.context import Context
from server.endpoint import operation
from server.pages.charts import minutes_chart, points_chart
from server.pages.render import page
from store.keys import Scope


def register(app: flask.Flask, context: Context) -> None:
    """Add the view to an application."""

    @operation(
        summary="The operator's page",
        scope=Scope.OPERATE,
        tag="pages",
        content_type="text/html",
        responses={200: {"type": "string"}},
    )
    def operator_page() -> flask.Response:
        """Show all figures, with the controls."""
        status = context.dashboard.status()
        return page(
            "operator.html",
            board=status,
            minutes=minutes_chart(status["throughput"]["minutes"]),
            points=points_chart(status["points"]),
        )

    app.add_url_rule(PAGE_PATH, "operator_page", operator_page, methods=["GET"])
