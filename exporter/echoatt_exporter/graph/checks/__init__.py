"""Checks of a finished graph and of its file."""
