"""Estimates of a diagonal, a trace, a norm and extreme eigenvalues from products."""
