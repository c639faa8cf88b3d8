"""Symmetric linear operators and how they combine."""
