"""The operator's page: the dashboard with its charts and the forms that control the batchers.

Registered by `server/app.py`. The same figures as JSON, and what the forms post to, are in
`server/api/views/operator.py`.
"""

from __future__ import annotations

import flask

from server.api.views.operator import PAGE_PATH
from server.context import Context
from server.pages.charts import minutes_chart, points_chart
from server.pages.render import page, page_operation
from server.status.eta import FULL_CHUNK_ITEMS
from store.keys import Scope


def register(app: flask.Flask, context: Context) -> None:
    """Add the view to an application."""

    @page_operation("The operator's page", scope=Scope.OPERATE)
    def operator_page() -> flask.Response:
        """Show the dashboard."""
        status = context.dashboard.status()
        return page(
            "operator.html",
            board=status,
            chunk_items=FULL_CHUNK_ITEMS,
            minutes=minutes_chart(status["throughput"]["minutes"]),
            points=points_chart(status["points"]),
        )

    app.add_url_rule(PAGE_PATH, "operator_page", operator_page, methods=["GET"])
