"""Hypergradients on small problems whose exact ones are known."""
