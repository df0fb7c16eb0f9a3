"""The promised speed, and ours beside its peers: ``python -m tests.benchmarks``."""
