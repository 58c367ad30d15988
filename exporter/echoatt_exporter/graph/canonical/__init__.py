"""Passes that bring a graph into its canonical form."""
