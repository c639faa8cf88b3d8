"""Pivoted Cholesky factorizations."""
