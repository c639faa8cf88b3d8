"""Linear models with a ridge penalty for each group of coefficients, learned by validation."""
