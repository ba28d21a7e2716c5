"""Contenders of `benchmarks/run.py`."""
