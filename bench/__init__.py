"""Benchmarks and real runs: each one command that prints the peer and ours in one run."""
