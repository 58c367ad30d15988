"""Writing a bundle: stage, check, publish."""
