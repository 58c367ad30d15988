"""What exporter and runtime agree on: sharing plan, caches, element types, manifest."""
