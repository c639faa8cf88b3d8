"""What all experiments have in common; ``processes`` and ``timing`` need Python alone."""
