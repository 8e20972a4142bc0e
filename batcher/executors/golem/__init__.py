"""The golem executor: chunks run on rented computers of the Golem Network, through yapapi.

`executor.py` is the Executor that the registry names. Below it: `session.py` (one connection to the daemon, one
allocation), `rental.py` (one model's demand and its workers), `hire.py` (one activity), `settling.py` (bills),
`recovery.py` (what killed batchers left behind). Pure and without any yapapi: `prices.py`, `limits.py`, `purse.py`,
`market.py`, `backlog.py`.
"""
