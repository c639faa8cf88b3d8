"""Figures 2, 3 and 4: a weight decay for each parameter."""
