"""Influence functions, for every framework."""
