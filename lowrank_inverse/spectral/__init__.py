"""Log determinants and traces by Lanczos quadrature."""
