"""Views of usage: what the caller's key has sent, or all keys for operators, as JSON and as CSV."""

from __future__ import annotations

import functools
from datetime import datetime

import flask

from server.api.query import read_query
from server.api.responses import json_response, set_headers
from server.auth.guard import current_key
from server.context import Views
from server.endpoint import Field, operation
from server.errors import ScopeMissing
from server.status.usage_report import DEFAULT_DAYS, UsageQuery, csv_text, show_quotas, show_row
from store.clients.keys import KeyRecord, Scope
from store.clients.usage import USAGE_BY
from store.store import Store

_DAY = {"type": "string", "format": "date", "examples": ["2026-11-20"]}
#: The parameters; the page has them too.
USAGE_FIELDS = (
    Field(name="since", help=f"First day, UTC; {DEFAULT_DAYS - 1} days before the last if not given.", schema=_DAY),
    Field(name="until", help="Last day; today if not given.", schema=_DAY),
    Field(name="by", help=f"Group by some of {', '.join(USAGE_BY)}, with commas between; by day if not given."),
    Field(name="key", help="Only the usage of this key, by its id or name; needs the scope operate."),
)
_operation = functools.partial(operation, tag="usage", scope=Scope.READ, query=USAGE_FIELDS, errors=(404,))


def read_usage_query(store: Store, *, now: datetime) -> tuple[UsageQuery, list[KeyRecord]]:
    """Read which usage is asked for. :return: the query, and the keys whose quotas belong to it.

    :raises InvalidParams: :raises ScopeMissing: :raises UnknownKey:
    """
    given = read_query(flask.request, *(field.name for field in USAGE_FIELDS))
    wanted, key = given.pop("key", None), current_key()
    if key is not None and not key.is_operator:
        if wanted and wanted not in (key.id, key.name):
            raise ScopeMissing("The usage of other keys needs an API key with the scope operate.")
        keys, key_id = [key], key.id
    elif wanted:
        keys = [store.keys.find_named(wanted)]
        key_id = keys[0].id
    else:
        keys, key_id = store.keys.list(), None
    return UsageQuery.parse(given, now=now, key_id=key_id), keys


class UsageViews(Views):
    """The views of usage."""

    @_operation("GET /usage", "Read how much was used, by day, key, model or kind of client", returns="Usage")
    def show_usage(self) -> flask.Response:
        """Add up the usage of a period, and list what is left of quotas."""
        query, keys = read_usage_query(self._store, now=self._now())
        return json_response(
            {
                "success": True,
                "since": query.since.isoformat(),
                "until": query.until.isoformat(),
                "by": list(query.by),
                "usage": [show_row(row, query.by) for row in query.read(self._store)],
                "total": show_row(query.read_total(self._store)),
                "quotas": show_quotas(self._store, keys, now=self._now()),
            }
        )

    @_operation("GET /usage.csv", "The same rows as CSV", content_type="text/csv")
    def usage_csv(self) -> flask.Response:
        """Write the rows as CSV."""
        query, _ = read_usage_query(self._store, now=self._now())
        text = csv_text(query.read(self._store), query.by)
        return set_headers(flask.Response(text, content_type="text/csv; charset=utf-8"))
