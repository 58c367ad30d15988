"""Rounding weights to few bits."""
