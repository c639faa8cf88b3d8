"""Columns chosen one after the other: pivoted Cholesky factorizations."""
