"""How things stand: dashboard, metrics, estimates."""
