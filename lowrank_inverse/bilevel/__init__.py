"""Hypergradients by implicit differentiation, for every framework."""
