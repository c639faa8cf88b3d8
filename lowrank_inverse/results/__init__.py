"""What a solve returns: solution, certificate, error."""
