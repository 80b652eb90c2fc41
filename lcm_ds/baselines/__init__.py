"""Baselines of next-concept prediction, and the targets that they and the model predict."""
