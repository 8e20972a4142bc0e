"""The operator's page: the dashboard with its charts and the forms that control the batchers.

The same figures as JSON, and what the forms post to, are in `server/api/views/operator.py`.
"""

from __future__ import annotations

import flask

from server.context import Views
from server.endpoint import PAGES, operation
from server.pages.charts import minutes_chart, points_chart
from server.pages.render import page
from server.status.eta import FULL_CHUNK_ITEMS
from store.clients.keys import Scope


class OperatorPageViews(Views):
    """The views of the operator's page."""

    @operation("GET /ui/operator", "The operator's page", Scope.OPERATE, tag=PAGES)
    def operator_page(self) -> flask.Response:
        """Show the dashboard."""
        status = self._context.dashboard.status()
        return page(
            "operator.html",
            board=status,
            chunk_items=FULL_CHUNK_ITEMS,
            minutes=minutes_chart(status["throughput"]["minutes"]),
            points=points_chart(status["points"]),
        )
