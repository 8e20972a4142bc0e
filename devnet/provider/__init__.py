"""A simulated provider: its offer, its activities as processes, its invoices and its faults."""
