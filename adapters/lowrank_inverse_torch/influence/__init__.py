"""Influence functions of torch models."""
