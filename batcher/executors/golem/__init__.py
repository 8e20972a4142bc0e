"""The golem executor: chunks run on providers of the Golem Network, through yapapi.

`executor.py` implements Executor. It uses `session.py` (one connection to the daemon and its allocation), which uses
`payments.py` (invoices) and `recovery.py` (closing what killed batchers left open); and `worker_pool.py` (one model's
demand), which uses `worker.py` (one activity). All of them share `parts.py`: `money.py` reserves what a step may cost,
`provider_records.py` bans, `job_queue.py` holds the chunks that wait, and `ledger_writer.py` records. Without any
yapapi: `settings.py`, `timings.py`, `offers.py` and these parts.

Golem's terms: a requestor (this executor) publishes a *demand*; providers answer with *offers*; both sign an
*agreement*; within it an *activity* is a running container; it is billed by *debit notes* and one *invoice*, paid from
an *allocation*. A *worker* here is a provider's activity that runs chunks.
"""
