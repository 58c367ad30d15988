"""What runs a bundle's graph: one step over rows of a cache."""
