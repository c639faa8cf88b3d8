"""Hypergradients, minimisers and bilevel problems of live torch models."""
