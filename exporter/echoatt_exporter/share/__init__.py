"""Sharing on the PyTorch side: teacher and plan to student, and students on disk."""
