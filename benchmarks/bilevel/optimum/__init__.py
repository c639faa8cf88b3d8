"""`minimize_bilevel` beside bilevel solvers of the literature: problems, solvers, comparison."""
