"""Settings of the solvers, prepared inverses, and the front door."""
