"""Live results: long polling, change notifications, server-sent events."""
