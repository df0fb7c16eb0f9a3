"""The promised speed, compared with its peers: ``python -m tests.benchmarks``."""
