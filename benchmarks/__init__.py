"""Measures what the design promises; see `python -m benchmarks --help`."""
