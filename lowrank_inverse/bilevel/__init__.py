"""Hypergradients by implicit differentiation, the same for every framework."""
