"""Passes that apply a sharing plan to a graph that still computes what followers drop."""
