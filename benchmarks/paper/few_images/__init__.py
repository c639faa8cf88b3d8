"""Tables 2 and 3: images that are learned, and starts from which few images suffice."""
