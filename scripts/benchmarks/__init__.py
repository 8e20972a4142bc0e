"""What `scripts/bench` runs. Each module measures one thing and prints what it saw."""
