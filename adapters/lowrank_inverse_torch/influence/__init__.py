"""Influence functions of PyTorch models."""
