"""The page of usage: a chart of the days, a table, what is left of quotas, and the same rows to download.

The figures are those of `server/api/views/usage.py`.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import flask

from server.api.views.usage import read_usage_query
from server.context import Views
from server.endpoint import PAGES, operation
from server.pages.charts import usage_chart
from server.pages.render import page, url_with_query
from server.status.usage_report import show_quotas
from store.clients.keys import Scope
from store.clients.usage import USAGE_BY


class UsagePageViews(Views):
    """The view of the page of usage."""

    @operation("GET /ui/usage", "The page of usage", Scope.READ, tag=PAGES)
    def usage_page(self) -> flask.Response:
        """Show the usage of a period, of the caller's key or of all."""
        query, keys = read_usage_query(self._store, now=self._now())
        by_day = {row.day: row for row in replace(query, by=("day",)).read(self._store)}
        count = (query.until - query.since).days + 1
        days = [(query.since + timedelta(days=index)).isoformat() for index in range(count)]
        given = {"since": query.since.isoformat(), "until": query.until.isoformat(), "by": ",".join(query.by)}
        csv_fields = {**given, **({"key": flask.request.args["key"]} if flask.request.args.get("key") else {})}
        return page(
            "usage.html",
            query=query,
            total=query.read_total(self._store),
            rows=query.read(self._store),
            choices=USAGE_BY,
            chart=usage_chart([(day, by_day.get(day)) for day in days]),
            quotas=show_quotas(self._store, keys, now=self._now()),
            csv_url=url_with_query("/usage.csv", csv_fields),
            wanted_key=csv_fields.get("key", ""),
        )
