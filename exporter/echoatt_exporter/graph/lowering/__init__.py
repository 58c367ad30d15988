"""Passes that turn a canonical graph into what a device runs well.

Each folder in here is a lowering: `steps` in its `__init__` says which passes make it up. It is
found by its name, which is a specification's `device`. Passes that several lowerings use lie beside
the folders.
"""
