"""The status of a home: dashboard, metrics, estimates of waiting times."""
