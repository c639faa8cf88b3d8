"""Symmetric linear operators, and their sums and products."""
