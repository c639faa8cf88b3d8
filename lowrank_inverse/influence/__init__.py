"""Influence functions, the same for every framework."""
