"""Influence functions of JAX models."""
