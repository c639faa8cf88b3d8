"""Influence functions of jax models."""
