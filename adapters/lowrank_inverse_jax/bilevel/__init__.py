"""Hypergradients and bilevel problems of functions of pytrees."""
