"""Arrays of any library: checks at the door, conversion, arithmetic and control flow."""
