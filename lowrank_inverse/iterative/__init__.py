"""Methods that only multiply: conjugate gradients and the Neumann series."""
