"""Methods that use products only: conjugate gradients and the Neumann series."""
