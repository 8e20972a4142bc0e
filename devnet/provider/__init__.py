"""A simulated provider: its offers, its activities as processes, its invoices and its faults."""
