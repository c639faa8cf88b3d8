"""Linear systems: accuracy, steps, time and memory of solvers on their own."""
