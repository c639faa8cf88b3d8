"""Solver settings, prepared inverses, and :func:`solve`."""
