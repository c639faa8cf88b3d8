"""Linear models with a learned ridge penalty for each group of coefficients."""
