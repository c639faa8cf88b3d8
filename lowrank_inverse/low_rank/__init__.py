"""Nyström approximations: columns, their k×k core, inverses and preconditioners."""
