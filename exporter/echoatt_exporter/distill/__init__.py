"""Adjust: distil a student from its teacher, then train it on the text (arXiv 2409.14595)."""
