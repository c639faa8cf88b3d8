"""What kernel matrices are made of: points, distances, and points that are spread."""
