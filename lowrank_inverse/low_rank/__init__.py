"""Nyström approximations: sampled columns, their k×k core, inverses and preconditioners."""
