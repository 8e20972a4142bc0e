"""Requests read together with what they cost: a request's share of its chunk's cost. Used by the parts of the store."""

from __future__ import annotations

import sqlite3
from decimal import Decimal
from typing import Any

from store.cost_split import equal_share
from store.records import RequestRecord

_COST_OF_CHUNK = "SELECT cost, answers, is_cost_final FROM chunks WHERE id = ?"


def request_with_cost(row: Any, connection: sqlite3.Connection, costs: dict[str, Any]) -> RequestRecord:
    """Build a request with its share of its chunk's cost.

    :param costs: the chunks read so far, shared by the requests of a list.
    """
    share, chunk_id = row["share"], row["chunk_id"]
    if share is None:
        return RequestRecord.from_row(row)
    if chunk_id not in costs:
        costs[chunk_id] = connection.execute(_COST_OF_CHUNK, (chunk_id,)).fetchone()
    cost, answers, is_final = costs[chunk_id] or (None, 0, 0)
    if cost is None:
        return RequestRecord.from_row(row)
    return RequestRecord.from_row(row, cost=equal_share(Decimal(cost), answers, share), is_cost_final=bool(is_final))
