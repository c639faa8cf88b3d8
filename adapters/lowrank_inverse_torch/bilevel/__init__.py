"""Hypergradients and bilevel problems of PyTorch models."""
