"""Time and memory of one hypergradient: ours, and those of other packages."""
