"""Further queries of influence functions: groups, tokens and ensembles."""
