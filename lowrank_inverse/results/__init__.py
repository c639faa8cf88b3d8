"""The results of a solve: solution, certificate and errors."""
