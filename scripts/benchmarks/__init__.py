"""The benchmarks that `scripts/bench` runs. Each module measures one thing and prints the results."""
