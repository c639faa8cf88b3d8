"""Hypergradients, minimisers and bilevel problems of functions of pytrees."""
