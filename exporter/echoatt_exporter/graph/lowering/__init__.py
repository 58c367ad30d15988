"""Passes that turn a canonical graph into what a device runs well."""
