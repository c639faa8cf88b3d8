"""What is asked of an influence function beside the score of each example."""
