"""Bundles beside other engines on the same work in one run; see `run.bench`."""
