"""The parts of `benchmarks/mixed.py`: one model with its formats, and the peers that choose."""
