"""Answers as they come: long polling, the change feed of a process, server-sent events."""
