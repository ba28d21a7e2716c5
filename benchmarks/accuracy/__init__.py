"""The grid of `benchmarks/accuracy.py`: models × formats × methods, ours and the peers'."""
