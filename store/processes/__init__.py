"""Processes of a home: which run, what they are told, and by which clock their claims end."""
