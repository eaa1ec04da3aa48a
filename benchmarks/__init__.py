"""Ratios against the literal code and against peers, all in one run: ``python -m benchmarks``."""
