"""Kronecker-factored curvature of torch models."""
