"""Several processes, each with its own part of the data."""
