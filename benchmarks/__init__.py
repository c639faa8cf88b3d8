"""Experiments and timings; run them with ``python -m benchmarks NAME``."""
