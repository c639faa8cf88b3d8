"""Functions of all eigenvalues of an operator, estimated by Lanczos quadrature."""
